"""Base classes of linear layers with a frozen weight packed in 4 or 8 bits.

`qweight` and `scale` are ordinary parameters that need no gradient, with one row for each row of
the weight: sharding, checkpoints and the meta device treat them as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.models.weights import local, slices

#: `read(name, index)`: the pretrained tensor of that name in this module, or the part of it given
#: by the slices of `index`. Without a name it is the one with the path of the module.
Read = Callable[[str, Any], Any]

#: `(dtype, in_features, *packed) -> [rows, in_features]`
Decoder = Callable[..., Tensor]

#: Weights that are quantized at a time: float32 copies of them are what a load needs beside the
#: packed tensors. Fewer on a CPU, where larger pieces gain little.
_CPU_PIECE, _PIECE = 1 << 18, 1 << 24


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept as packed tensors; subclasses encode and decode.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: kept as it is, or None.
        dtype: of `dequantize()`; the product has the input's dtype.
        device: of the packed tensors.
        **options: arguments of `allocate`.
    """

    qweight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None
    #: Number of inputs that are packed together, so that ranks cannot share them.
    column_step = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.options = options
        self.register_parameter("bias", bias)
        self.allocate(device, **options)

    def allocate(self, device: torch.device | str | None) -> None:
        """Create the packed tensors, uninitialized."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return rows of the weight `[rows, in]` as the module's packed tensors, by name."""
        raise NotImplementedError

    def packed(self, rows: slice | None = None) -> tuple[Tensor | None, ...]:
        """Return the tensors that a decoder takes, or those of some rows of the weight."""
        raise NotImplementedError

    def decoder(self, device: torch.device) -> Decoder:
        """Return the function that decodes on a device."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, computed each time: for code that looks at its dtype."""
        return self.dequantize()

    def dequantize(self) -> Tensor:
        """Return the weight `[out, in]`, or this rank's rows of it where it is sharded."""
        packed = [None if t is None else local(t) for t in self.packed()]
        decode = self.decoder(local(self.qweight).device)
        return decode(self.dtype, self.in_features, *packed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product `[..., out]` for `x` `[..., in]`, in the dtype of `x` or autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self.bias, self.decoder(x.device), *self.packed())

    def fill_from(self, read: Read) -> None:
        """Read and quantize the rows that this rank holds a part of, piece by piece.

        Whole rows are quantized also where a rank keeps some columns of them: scales may depend on
        all of a row.

        Args:
            read: reads the pretrained `weight`.

        Raises:
            ValueError: the pretrained weight has another shape.
        """
        require_shape(self, read("weight", None))
        self.pack(lambda rows: read("weight", (rows, slice(None))))

    def pack(self, read_rows: Callable[[slice], Tensor]) -> None:
        """Quantize the rows that this rank holds a part of, piece by piece.

        Args:
            read_rows: returns rows `[rows, in]` of the weight.
        """
        rows, device = slices(self.qweight)[0], local(self.qweight).device
        step = max(1, (_CPU_PIECE if device.type == "cpu" else _PIECE) // self.in_features)
        with torch.no_grad():
            for start in range(rows.start, rows.stop, step):
                part = slice(start, min(start + step, rows.stop))
                weight = read_rows(part).to(device)
                here = slice(part.start - rows.start, part.stop - rows.start)
                for name, value in self.encode(weight).items():
                    parameter = getattr(self, name)
                    local(parameter)[here].copy_(value[:, slices(parameter)[1]])

    def reset_parameters(self) -> None:
        """Draw random values, uniform within 1 / sqrt(in), as `torch.nn.Linear` does."""
        bound = self.in_features**-0.5
        device = local(self.qweight).device

        def draw(rows: slice) -> Tensor:
            shape = (rows.stop - rows.start, self.in_features)
            return torch.empty(shape, device=device).uniform_(-bound, bound)

        self.pack(draw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def verify_shards(self, read: Read) -> None:
        """Gather the sharded weight and compare it with one quantized whole: a collective call.

        Args:
            read: reads the pretrained `weight`.

        Raises:
            RuntimeError: they differ, on all ranks alike.
        """
        own = dict(self.named_parameters(recurse=False))
        own.pop("bias", None)
        if not any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in own.values()):
            return
        whole, gathered = self._unsharded(), self._unsharded()
        whole.fill_from(read)
        for name, parameter in own.items():
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            getattr(gathered, name).data.copy_(value)
        if not torch.equal(whole.dequantize(), gathered.dequantize()):
            raise RuntimeError(
                f"the sharded {type(self).__name__} [{self.out_features}, {self.in_features}] "
                f"does not hold the weight that one process quantizes from the same file: the "
                f"layout and the packed tensors do not fit each other"
            )

    def _unsharded(self) -> QuantizedLinear:
        """Return an unfilled layer like this one, unsharded and without bias."""
        make: Any = type(self)
        device = local(self.qweight).device
        return make(
            self.in_features, self.out_features, dtype=self.dtype, device=device, **self.options
        )

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias`; only the packed weight is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Any, *packed: Any) -> Tensor:
        ctx.decode, ctx.in_features, ctx.tensors = decode, x.shape[-1], len(packed)
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(*packed)
        weight = decode(x.dtype, x.shape[-1], *packed)  # [out, in]
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Accessed once only: activation checkpointing allows no second time.
            weight = ctx.decode(grad.dtype, ctx.in_features, *ctx.saved_tensors)
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias)
        return grad_x, grad_bias, None, *[None] * ctx.tensors


def taken(rows: slice | None, *packed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return some rows of packed tensors; None takes all."""
    return packed if rows is None else tuple(None if t is None else t[rows] for t in packed)


def require_shape(layer: Any, weight: Tensor) -> None:
    """Raise ValueError when a pretrained weight does not have the shape of a layer's."""
    there, wanted = list(weight.shape), [layer.out_features, layer.in_features]
    if there != wanted:
        raise ValueError(f"weight: {there} there, {wanted} in the model")


def frozen(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None
) -> nn.Parameter:
    """Return an uninitialized parameter without gradient: sharded and saved as any other."""
    return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device), requires_grad=False)


def require_bitsandbytes() -> Any:
    """Return the module bitsandbytes; raise ImportError that says how to install it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "quantize: this needs bitsandbytes: pip install 'ditty_di[bnb]', or choose "
            "quantize=nf4 or quantize=int8, which do not need it"
        ) from error
    return bitsandbytes
