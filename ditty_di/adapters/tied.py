"""LoRA on tied weights: what peft's `ensure_weight_tying` means, on any layout."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ditty_di.adapters.state import NAME


def tie(adapted: nn.Module, config: Any) -> None:
    """Let layers tied to the input embedding use its LoRA matrices, transposed.

    peft gives these layers parameters of their own that share memory with the embedding's: an
    optimizer would update them twice, and the meta device and sharding would part them. Here there
    is one parameter, with the gradients of both uses.

    Args:
        adapted: a model that peft has added its layers to.
        config: the configuration that peft has written into.

    Raises:
        ValueError: the layers cannot share their matrices.
    """
    from peft.tuners.lora import LoraLayer

    names = set(getattr(config, "target_modules_to_tie", None) or ())
    if not names:
        return
    source: Any = adapted.get_input_embeddings()  # type: ignore[operator]
    for path, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer) or not any(f".{path}".endswith(f".{n}") for n in names):
            continue
        if NAME not in layer.lora_A or layer.r[NAME] != source.r[NAME] or layer.lora_bias[NAME]:
            raise ValueError(
                f"adapter: ensure_weight_tying cannot give {path} the embedding's matrices: it "
                f"must be a linear layer of the same rank, without lora_bias. Without "
                f"ensure_weight_tying each layer has its own, and export=merged unties the weights"
            )
        layer.lora_A[NAME] = _Transposed(source.lora_embedding_B)
        layer.lora_B[NAME] = _Transposed(source.lora_embedding_A)


class _Transposed(nn.Module):
    """A linear layer without bias whose weight is another layer's parameter, transposed."""

    def __init__(self, parameters: nn.ParameterDict) -> None:
        super().__init__()
        self._parameters_of = (parameters,)  # in a tuple, so that they are not this layer's too

    @property
    def weight(self) -> Tensor:
        return self._parameters_of[0][NAME].T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
