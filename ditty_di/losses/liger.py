"""Cross-entropy from hidden states with Liger's fused kernels (extra `[liger]`, CUDA only)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.losses.deferred import DeferredOutput, Head, defer_head
from ditty_di.losses.linear_cross_entropy import labelled

if TYPE_CHECKING:
    from ditty_di.protocols import Batch


class LigerLinearCrossEntropyLoss(nn.Module):
    """Cross-entropy in nats a valid label, of a model with `ditty_di.losses.deferred_head`.

    Liger computes the gradients in the forward pass, chunk by chunk, and so computes each logit
    once. It multiplies by the projection's weight itself: the projection must be a plain linear
    layer. Soft-capping is done by the kernel, and scaling by a number before it.

    Args:
        ignore_index: labels with this value weigh nothing.
        accum_dtype: name of the torch dtype that sums the weight's gradient over chunks; None is
            the weight's own.

    Shapes: hidden states `[batch, seq, hidden]`, labels `[batch, seq]`.

    Raises:
        ImportError: liger-kernel is not installed.
        RuntimeError: there is no accelerator for its kernels.
    """

    contract = "logits:*:f | ctx.target:2:i64 -> loss:0:f"

    def __init__(self, *, ignore_index: int = -100, accum_dtype: str | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
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

    prepare_model = staticmethod(defer_head)

    def count(self, batch: Batch, /) -> Tensor:
        """Valid labels of the batch, shape `[]`, int64."""
        return (batch[1] != self.ignore_index).sum()

    def forward(
        self, output: DeferredOutput, labels: Tensor, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed cross-entropy over `global_count`, shape `[]`, in float32.

        Raises:
            TypeError: the model returns logits.
            ValueError: the projection is no plain linear layer, or the model does to its logits
                what the kernel cannot.
        """
        hidden, labels, head = labelled(self, output, labels, self.ignore_index)
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
        return fused(weight, hidden, labels, bias).float() / global_count, {}


def plain_linear(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight `[vocab, hidden]` and bias `[vocab]` of a projection that has nothing else.

    Raises:
        ValueError: it has adapters, or a quantised weight.
    """
    tensors = {**dict(projection.named_parameters()), **dict(projection.named_buffers())}
    weight, bias = tensors.pop("weight", None), tensors.pop("bias", None)
    if weight is None or not weight.is_floating_point() or tensors:
        raise ValueError(
            f"loss: Liger needs a plain linear layer as output projection, but the model has a "
            f"{type(projection).__name__} with {', '.join(tensors) or 'no weight'}; use "
            f"loss=chunked, or leave the projection out of the adapter and of quantisation"
        )
    return weight, bias


def scale_and_softcap(head: Head) -> tuple[float, float | None]:
    """The factor on the logits and then their soft cap, when that is all a model does to them.

    Soft-capping is `c * tanh(logits / c)` (Gemma 2, arXiv:2408.00118).

    Raises:
        ValueError: it does something else.
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
            f"loss: the model does this to its logits: {done}. Liger's kernel can multiply by a "
            f"number and soft-cap; use loss=chunked"
        )
    return scale, cap
