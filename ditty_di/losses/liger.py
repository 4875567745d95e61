"""Cross-entropy from hidden states with Liger's fused kernels (extra `[liger]`, CUDA only)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.batch import Batch
from ditty_di.losses.hidden_states import Head, HiddenStatesOutput
from ditty_di.losses.linear_cross_entropy import LinearCrossEntropyLoss, labeled


class LigerLinearCrossEntropyLoss(LinearCrossEntropyLoss):
    """Cross-entropy in nats per valid label, of a model with `ditty_di.losses.skip_lm_head`.

    Liger computes the gradients in the forward pass, chunk by chunk, and so computes each logit
    once. It multiplies by the projection's weight itself: the projection must be a plain linear
    layer. Soft-capping is done by the kernel, and scaling by a number before it.

    Args:
        ignore_index: label value excluded from the loss.
        accum_dtype: name of the torch dtype in which the weight's gradient is summed over chunks;
            None is the weight's own.

    Shapes: hidden states `[batch, seq, hidden]`, labels `[batch, seq]`.

    Attributes:
        needs_whole_head: a rank must have all rows of the projection.

    Raises:
        ImportError: liger-kernel is not installed.
        RuntimeError: there is no accelerator for its kernels.
    """

    needs_whole_head = True

    def __init__(self, *, ignore_index: int = -100, accum_dtype: str | None = None) -> None:
        super().__init__(ignore_index=ignore_index)
        if not torch.accelerator.is_available():
            raise RuntimeError(
                "loss: Liger's kernels need a CUDA device, and this machine has none; "
                "loss=chunked computes the same on any device"
            )
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError as error:
            raise ImportError(
                f'loss: Liger is not installed ({error}); pip install "ditty_di[liger]", or use '
                f"loss=chunked"
            ) from None
        self._dtype = getattr(torch, accum_dtype) if accum_dtype else None
        self._fused: Any = LigerFusedLinearCrossEntropyLoss

    def forward(
        self, output: HiddenStatesOutput, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed cross-entropy over `num_valid_global`, shape `[]`, in float32.

        Raises:
            TypeError: the model returns logits.
            ValueError: the projection is not a plain linear layer, or the model changes its logits
                in a way that the kernel does not support.
        """
        hidden, labels, head, _ = labeled(self, output, batch.target, self.ignore_index)
        weight, bias = plain_linear(head.projection)
        scale, softcap = scale_and_softcap(head)
        if scale != 1.0:
            hidden = hidden * scale
            bias = None if bias is None else bias * scale
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.requires_grad_()  # or Liger leaves out the weight's gradient too
        fused = self._fused(
            ignore_index=self.ignore_index,
            reduction="sum",
            softcap=softcap,
            accum_dtype=self._dtype,
        )
        return fused(weight, hidden, labels, bias).float() / num_valid_global, {}


def plain_linear(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight `[vocab, hidden]` and bias `[vocab]` of a plain linear layer.

    Args:
        projection: the output projection.

    Raises:
        ValueError: it has adapters, or a quantized weight.
    """
    tensors = {**dict(projection.named_parameters()), **dict(projection.named_buffers())}
    weight, bias = tensors.pop("weight", None), tensors.pop("bias", None)
    if weight is None or not weight.is_floating_point() or tensors:
        raise ValueError(
            f"loss: Liger needs a plain linear layer as output projection, but the model has a "
            f"{type(projection).__name__} with {', '.join(tensors) or 'no weight'}; use "
            f"loss=chunked, or leave the projection out of the adapter and of quantization"
        )
    return weight, bias


def scale_and_softcap(head: Head) -> tuple[float, float | None]:
    """Return the factor on the logits and then their soft cap.

    Soft-capping is `c * tanh(logits / c)` (Gemma 2, arXiv:2408.00118).

    Args:
        head: the recorded head of the model.

    Raises:
        ValueError: the model does something else to its logits.
    """
    names = tuple(step.name for step in head.steps)
    numbers = [
        next((a for a in step.arguments if isinstance(a, float | int)), None) for step in head.steps
    ]
    scale, cap = 1.0, None
    if names[:1] in (("mul",), ("div",)) and names[1:2] != ("tanh",) and numbers[0] is not None:
        scale = float(numbers[0]) if names[0] == "mul" else 1.0 / numbers[0]
        names, numbers = names[1:], numbers[1:]
    if names == ("div", "tanh", "mul") and numbers[0] == numbers[2] is not None:
        cap, names = float(numbers[2]), ()
    if names:
        done = ", ".join(step.name for step in head.steps)
        raise ValueError(
            f"loss: the model applies {done} to its logits. Liger's kernel can only multiply by a "
            f"number and soft-cap; use loss=chunked"
        )
    return scale, cap
