"""Fused experts whose matrices are packed in 4 or 8 bits, each as if it stood alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditty_di.models.deferred import deferred
from ditty_di.models.stacked import Stacked, multiply
from ditty_di.models.weights import local
from ditty_di.quantization.int8_linear import Int8Linear
from ditty_di.quantization.linear import Decoder, QuantizedLinear, Read
from ditty_di.quantization.nf4_linear import NF4Linear


class PackedExperts(Stacked, QuantizedLinear):
    """A frozen weight `[experts, rows, columns]` in place of a parameter of a module of experts.

    The packed tensors are those of a linear layer with the rows of all experts one below another:
    blocks never cross rows, so each matrix has the bytes that it would have alone, and any rank
    packs its own rows. `Stacked` says how the module of experts multiplies.

    Args:
        experts: number of matrices.
        rows: of each matrix.
        columns: of each matrix.
        **layer: arguments of the packed linear layer.
    """

    def __init__(self, experts: int, rows: int, columns: int, **layer: Any) -> None:
        super().__init__(columns, experts * rows, **layer)
        self.shape = torch.Size((experts, rows, columns))

    @property
    def device(self) -> torch.device:
        """The device of the packed tensors."""
        return self.qweight.device

    def fill_from(self, read: Read) -> None:
        """Read and pack the rows that this rank holds a part of, piece by piece.

        Args:
            read: reads the pretrained weight, which has the name of this module.

        Raises:
            ValueError: the pretrained weight has another shape.
        """
        stored = deferred(read("", None))
        if stored.shape != self.shape:
            raise ValueError(f"{list(stored.shape)} there, {list(self.shape)} in the model")
        rows = self.shape[1]

        def read_rows(part: slice) -> Tensor:
            pieces = []
            for expert in range(part.start // rows, -(-part.stop // rows)):
                start, stop = (n - expert * rows for n in (part.start, part.stop))
                own = slice(max(0, start), min(rows, stop))
                pieces.append(stored.read((slice(expert, expert + 1), own))[0])
            return torch.cat(pieces)

        self.pack(read_rows)

    def multiply(
        self, x: Tensor, *, transposed: bool, expert: int | None = None, ends: Tensor | None = None
    ) -> Tensor:
        """Return the product in the dtype of `x` or autocast; see `Stacked.multiply`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = self.shape[1]
        taken = None if expert is None else slice(expert * rows, (expert + 1) * rows)
        packed = self.packed(taken)
        shape = tuple(self.shape) if expert is None else tuple(self.shape[1:])
        return _Product.apply(x, ends, transposed, self.decoder(x.device), shape, *packed)

    def whole(self) -> Tensor:
        """Return the dequantized weight."""
        decode = self.decoder(self.qweight.device)
        return decode(self.dtype, self.in_features, *self.packed()).reshape(self.shape)

    def _unsharded(self) -> QuantizedLinear:
        make: Any = type(self)
        device = local(self.qweight).device
        return make(*self.shape, dtype=self.dtype, device=device, **self.options)

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return ", ".join(map(str, self.shape))


class NF4Experts(PackedExperts, NF4Linear):
    """Experts as `NF4Linear` packs them."""


class Int8Experts(PackedExperts, Int8Linear):
    """Experts as `Int8Linear` packs them."""


class _Product(torch.autograd.Function):
    """The product with one matrix or with each; only packed ones are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ends: Tensor | None,
        transposed: bool,
        decode: Decoder,
        shape: tuple[int, ...],
        *packed: Any,
    ) -> Tensor:
        ctx.transposed, ctx.decode, ctx.shape, ctx.tensors = transposed, decode, shape, len(packed)
        ctx.save_for_backward(ends, *packed)
        weight = decode(x.dtype, shape[-1], *packed).reshape(shape)
        return multiply(x, weight, transposed=transposed, ends=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Accessed once only: activation checkpointing allows no second time.
            ends, *packed = ctx.saved_tensors
            weight = ctx.decode(grad.dtype, ctx.shape[-1], *packed).reshape(ctx.shape)
            grad_x = multiply(grad.contiguous(), weight, transposed=not ctx.transposed, ends=ends)
        return grad_x, None, None, None, None, *[None] * ctx.tensors
