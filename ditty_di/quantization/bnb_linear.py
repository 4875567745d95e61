"""bitsandbytes' own layers, filled one by one while a base is read, with their traps closed."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.quantization.linear import Read


class Linear4bit(bnb.nn.Linear4bit):
    """`bitsandbytes.nn.Linear4bit` in NF4 that makes its weight from a pretrained one.

    Until then the weight is uint8 of the packed size, so that a model on meta gets no more memory
    than it needs. On CPUs with AVX512-BF16 the stock layer repacks the weight in its first
    evaluation and has no input gradient ever after; this one does not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        double_quant: bool = True,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=False,
            compress_statistics=double_quant,
            quant_type="nf4",
            device="meta",
        )
        self.dtype, self.double_quant = dtype, double_quant
        self.support_avx512bf16_for_cpu = False
        self.register_parameter("bias", bias)
        size = -(-in_features * out_features // 2)
        packed = torch.empty(size, 1, dtype=torch.uint8, device=device)
        self.weight = self._parameter(packed, bnb_quantized=True)

    def fill_from(self, read: Read) -> None:
        """Reads and quantises the weight."""
        weight = _whole(self, read)
        # On the way to a device it quantises itself.
        self.weight = self._parameter(weight, bnb_quantized=False).to(self.weight.device)

    def dequantize(self) -> Tensor:
        """`[out, in]` in the dtype that the layer was made with."""
        return bnb.functional.dequantize_4bit(self.weight.data, self.quant_state).to(self.dtype)

    def reset_parameters(self) -> None:
        """Random values, uniform within 1 / sqrt(in)."""
        _reset(self)

    def _parameter(self, data: Tensor, *, bnb_quantized: bool) -> Any:
        return bnb.nn.Params4bit(
            data,
            requires_grad=False,
            compress_statistics=self.double_quant,
            quant_type="nf4",
            module=self,
            bnb_quantized=bnb_quantized,
        )


class Linear8bit(bnb.nn.Linear8bitLt):
    """`bitsandbytes.nn.Linear8bitLt` that makes its weight from a pretrained one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        threshold: float = 6.0,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
        self.dtype = dtype
        self.register_parameter("bias", bias)
        packed = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def fill_from(self, read: Read) -> None:
        """Reads and quantises the weight."""
        weight = _whole(self, read)
        device = self.weight.device
        # It quantises on the way from the CPU only.
        weight = weight.cpu()
        parameter: Any = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        self.weight = parameter.to(device)

    def dequantize(self) -> Tensor:
        """`[out, in]` in the dtype that the layer was made with."""
        weight, state = cast(Any, self.weight), cast(Any, self.state)
        # The first forward moves it from the one to the other.
        scale = state.SCB if weight.SCB is None else weight.SCB
        return (weight.data * (scale.view(-1, 1) / 127.0)).to(self.dtype)

    def reset_parameters(self) -> None:
        """Random values, uniform within 1 / sqrt(in)."""
        _reset(self)


def _whole(layer: Any, read: Read) -> Tensor:
    if isinstance(layer.weight, DTensor):
        raise ValueError(
            "bitsandbytes' layers cannot be sharded; use quantize=nf4 or quantize=int8, or one "
            "process (launcher.nproc=1)"
        )
    # In the model's dtype, as transformers quantises it: what is dequantised has it then.
    weight = read("weight", None).to(layer.dtype)
    wanted = (layer.out_features, layer.in_features)
    if tuple(weight.shape) != wanted:
        raise ValueError(f"weight: {list(weight.shape)} there, {list(wanted)} in the model")
    return weight


def _reset(layer: Any) -> None:
    if layer.weight.dtype.is_floating_point:
        return  # the constructor of nn.Linear calls it, before there is a packed weight
    bound = layer.in_features**-0.5
    shape = (layer.out_features, layer.in_features)
    values = torch.empty(shape, device=layer.weight.device).uniform_(-bound, bound)
    layer.fill_from(lambda name, index: values)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
