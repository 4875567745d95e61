"""Import transformers' models without what they import and hardly ever call.

Importing this module does it, so it must be imported before a model's class.
"""

from ditty_di.postponed import postponed

with postponed(
    {
        # for the losses of object detection
        "scipy.optimize": ("linear_sum_assignment",),
        # for models that torchao has quantized
        "torchao.prototype.safetensors.safetensors_support": ("flatten_tensor_state_dict",),
    }
):
    import transformers.modeling_utils  # noqa: F401
