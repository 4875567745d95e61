"""A trained model in one process, ready to be used."""

from __future__ import annotations

import torch
from torch import nn

from ditty_di.models.weights import is_meta, materialize, uninitialized
from ditty_di.protocols import WeightsFn


def ready(model: nn.Module, weights: WeightsFn | None, device: torch.device) -> None:
    """Put a model on a device, with its values, in evaluation mode.

    Args:
        model: The model, on meta or with its values.
        weights: Fills a model on meta.
        device: The device.

    Raises:
        ValueError: Nothing fills a model on meta, or a tensor has no value afterwards.
    """
    if not is_meta(model):
        model.to(device)
    elif weights is None:
        raise ValueError(
            "weights: the model is on the meta device, so something must fill it: a partial of "
            "ditty_di.checkpoint.read.from_checkpoint, or a ditty_di.models.pretrained.Pretrained"
        )
    else:
        materialize(model, device)
        weights(model, device=device)
        if missing := uninitialized(model):
            raise ValueError(
                f"weights: these tensors have no value: {missing[:5]}; buffers that no checkpoint "
                f"has come from its `initialize`"
            )
    model.eval()
