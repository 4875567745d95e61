"""LoRA and DoRA on linear layers whose weight is packed in 4 or 8 bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


def refuse_to_merge() -> NoReturn:
    """Raise ValueError: merging would quantize the sum a second time."""
    raise ValueError(
        "adapters cannot be merged into a quantized base without rounding it a second time; "
        "export=merged merges them into the unquantized one"
    )


class QuantizedLoraLinear(Linear):
    """peft's LoRA on a layer with `dequantize()`, which stays unchanged."""

    @property
    def weight(self) -> Any:
        """The base's weight, not the packed one of peft: some models read it (Mamba)."""
        return self.get_base_layer().weight

    @property
    def lora_variants(self) -> dict[Any, Any]:
        """The variants by the options that ask for them."""
        return {**super().lora_variants, ("use_dora",): QuantizedDora}

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: merging would quantize the sum a second time."""
        refuse_to_merge()


class QuantizedDora(DoraLinearVariant):
    """DoRA on a packed weight, unpacked once a forward pass (https://arxiv.org/abs/2402.09353)."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Create the magnitude `[out]`: the norms of the weight's rows, if it has values."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLinearLayer(fan_in_fan_out=False)
        base, like = module.get_base_layer(), module.lora_A[adapter_name].weight
        if like.is_meta:
            norms = torch.empty(base.out_features, dtype=like.dtype, device="meta")
        else:
            norms = base.dequantize().to(like.dtype).norm(dim=1)
        layer.weight = nn.Parameter(norms)
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the layer's output `[..., out]` for `x` `[..., in]` and the base's `result`."""
        dropout = module.lora_dropout[active_adapter]
        base = module.get_base_layer()
        base_result: Tensor | None = result
        if module.training and not isinstance(dropout, nn.Identity):
            # What is dropped is missing in the base's product too, so it is computed anew.
            x, base_result = dropout(x), None
        return result + module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            # peft uses the weight several times, and a packed one is unpacked each time.
            base_layer=SimpleNamespace(weight=base.dequantize(), bias=base.bias),
            base_result=base_result,
        )
