"""8-bit integers with one scale a row: `weight = qweight * scale`."""

from __future__ import annotations

import torch
from torch import Tensor

from ditty_di.quantization.linear import Decoder, QuantizedLinear, frozen, taken


def decode(dtype: torch.dtype, in_features: int, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight `[out, in]`; exact in bfloat16 up to the rounding of the product."""
    return qweight.to(dtype) * scale.to(dtype)


class Int8Linear(QuantizedLinear):
    """8 bits a weight: `qweight` int8 `[out, in]`, `scale` bfloat16 `[out, 1]`.

    The scale is the row's largest absolute value / 127. It is bfloat16, so that mixed precision
    in bfloat16 gathers it unchanged. The arguments are those of `QuantizedLinear`.
    """

    def allocate(self, device: torch.device | str | None) -> None:
        """Create `qweight` and `scale`."""
        self.qweight = frozen(self.out_features, self.in_features, torch.int8, device)
        self.scale = frozen(self.out_features, 1, torch.bfloat16, device)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return rows of the weight as `qweight` and `scale`."""
        weight = weight.float()
        scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
        steps = weight / scale.float().clamp_min(1e-38)
        return {"qweight": steps.round().clamp(-127, 127).to(torch.int8), "scale": scale}

    def packed(self, rows: slice | None = None) -> tuple[Tensor | None, ...]:
        """Return the tensors that `decode` takes, or those of some rows of the weight."""
        return taken(rows, self.qweight, self.scale)

    def decoder(self, device: torch.device) -> Decoder:
        """Return `decode`."""
        return decode
