"""A trained model in one process, ready to be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ditty_di.protocols import WeightsFn


def ready(model: nn.Module, weights: WeightsFn | None, device: torch.device) -> None:
    """Puts the model on `device`, filled by `weights` if it is on meta, in evaluation mode.

    Raises:
        ValueError: nothing fills a model on meta, or something in it stayed without a value.
    """
    from ditty_di.models.weights import is_meta, materialize, unset

    if is_meta(model):
        if weights is None:
            raise ValueError(
                "weights: the model is on the meta device, so something must fill it; pass a "
                "partial of ditty_di.checkpoint.read.from_checkpoint, or a "
                "ditty_di.models.pretrained.Pretrained"
            )
        materialize(model, device)
        weights(model, device=device)
        if missing := unset(model):
            raise ValueError(
                f"weights: these tensors have no value: {missing[:5]}; buffers that no checkpoint "
                f"has come from its `initialize`"
            )
    else:
        model.to(device)
    model.eval()
