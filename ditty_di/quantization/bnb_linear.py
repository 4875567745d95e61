"""bitsandbytes' layers, filled from a pretrained weight, with workarounds for their pitfalls."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.quantization.linear import Read, frozen, require_shape


class _Filled:
    """Mixin of layers of bitsandbytes that make their weight from a pretrained one.

    Args:
        *sizes: of the input and of the output.
        bias: kept as it is, or None.
        dtype: of `dequantize()`.
        device: of the packed weight.
        **options: of the stock layer.
    """

    dtype: torch.dtype

    def __init__(
        self,
        *sizes: int,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        make: Any = super().__init__
        make(*sizes, bias=False, device="meta", **options)
        layer: Any = self
        layer.dtype = dtype
        layer.register_parameter("bias", bias)
        layer.weight = layer.unfilled(device)

    def fill_from(self, read: Read) -> None:
        """Read and quantize the pretrained `weight`."""
        layer: Any = self
        if isinstance(layer.weight, DTensor):
            raise ValueError(
                "bitsandbytes' layers cannot be sharded; use quantize=nf4 or quantize=int8, or one "
                "process (launcher.nproc=1)"
            )
        # In the model's dtype, as transformers quantizes it: what is dequantized has it then.
        weight = read("weight", None).to(layer.dtype)
        require_shape(layer, weight)
        layer.weight = layer.quantized(weight, layer.weight.device)

    def reset_parameters(self) -> None:
        """Draw random values, uniform within 1 / sqrt(in)."""
        layer: Any = self
        if layer.weight.dtype.is_floating_point:
            return  # called by the constructor of nn.Linear, before there is a packed weight
        bound = layer.in_features**-0.5
        shape = (layer.out_features, layer.in_features)
        values = torch.empty(shape, device=layer.weight.device).uniform_(-bound, bound)
        self.fill_from(lambda name, index: values)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Linear4bit(_Filled, bnb.nn.Linear4bit):
    """`bitsandbytes.nn.Linear4bit` in NF4 that makes its weight from a pretrained one.

    Until then the weight is uint8 of the packed size, so that a model on meta gets no more memory
    than it needs. On CPUs with AVX512-BF16 the stock layer repacks the weight in its first
    evaluation and has no input gradient afterwards; this one does not.

    Args:
        *sizes: of the input and of the output.
        double_quant: bitsandbytes' `compress_statistics`.
        **layer: further arguments of the mixin.
    """

    def __init__(self, *sizes: int, double_quant: bool = True, **layer: Any) -> None:
        self._options: dict[str, Any] = {"compress_statistics": double_quant, "quant_type": "nf4"}
        super().__init__(*sizes, **layer, **self._options)
        self.support_avx512bf16_for_cpu = False

    def unfilled(self, device: torch.device | str | None) -> nn.Parameter:
        """Return an uninitialized weight."""
        size = -(-self.in_features * self.out_features // 2)
        packed = torch.empty(size, 1, dtype=torch.uint8, device=device)
        return self._parameter(packed, bnb_quantized=True)

    def quantized(self, weight: Tensor, device: torch.device) -> nn.Parameter:
        """Return a weight as a parameter on a device; it quantizes itself on the way."""
        return self._parameter(weight, bnb_quantized=False).to(device)

    def dequantize(self) -> Tensor:
        """Return the weight `[out, in]` in the dtype that the layer was made with."""
        return bnb.functional.dequantize_4bit(self.weight.data, self.quant_state).to(self.dtype)

    def _parameter(self, data: Tensor, *, bnb_quantized: bool) -> Any:
        return bnb.nn.Params4bit(
            data, requires_grad=False, module=self, bnb_quantized=bnb_quantized, **self._options
        )


class Linear8bit(_Filled, bnb.nn.Linear8bitLt):
    """`bitsandbytes.nn.Linear8bitLt` that makes its weight from a pretrained one.

    Args:
        *sizes: of the input and of the output.
        threshold: inputs beyond it are multiplied in 16 bits.
        **layer: further arguments of the mixin.
    """

    def __init__(self, *sizes: int, threshold: float = 6.0, **layer: Any) -> None:
        super().__init__(*sizes, **layer, has_fp16_weights=False, threshold=threshold)

    def unfilled(self, device: torch.device | str | None) -> nn.Parameter:
        """Return an uninitialized weight."""
        return frozen(self.out_features, self.in_features, torch.int8, device)

    def quantized(self, weight: Tensor, device: torch.device) -> nn.Parameter:
        """Return a weight as a parameter on a device; it is quantized on its way from the CPU."""
        parameter: Any = bnb.nn.Int8Params(
            weight.cpu(), requires_grad=False, has_fp16_weights=False
        )
        return parameter.to(device)

    def dequantize(self) -> Tensor:
        """Return the weight `[out, in]` in the dtype that the layer was made with."""
        weight, state = cast(Any, self.weight), cast(Any, self.state)
        # The first forward moves it from the one to the other.
        scale = state.SCB if weight.SCB is None else weight.SCB
        return (weight.data * (scale.view(-1, 1) / 127.0)).to(self.dtype)
