import pytest

from ditty_di.fqn import base_fqn, canonical_fqn


def test_whole_segments_of_wrappers_are_dropped_and_nothing_else():
    assert canonical_fqn("layers.0._checkpoint_wrapped_module.w._orig_mod.b") == "layers.0.w.b"
    assert canonical_fqn("my_orig_mod.lm_head.weight") == "my_orig_mod.lm_head.weight"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.q.base_layer.bias", "model.layers.0.q.bias"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model._orig_mod.x.base_layer._orig_mod.qweight", "x.qweight"),
        ("base_model.model.q.lora_A.default.weight", "q.lora_A.default.weight"),
        ("my_base_layer.base_model.model.weight", "my_base_layer.base_model.model.weight"),
    ],
)
def test_names_in_a_base_are_without_what_peft_adds(name, expected):
    assert base_fqn(name) == expected
