"""A small copy of a model with random values: what is probed where the model itself cannot be.

Whether documents see each other follows from the structure of each layer, so repeated layers and
the model's values are not needed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ditty_di.models.weights import (
    InitModule,
    hugging_face,
    initialize,
    is_meta,
    materialize,
    torch_reset,
    torchtitan,
    transformers_model,
    uninitialized,
)


def copy_of_each_kind(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose lists end where every kind of their layers has occurred.

    The first layers keep their numbers, which index `layer_types` and the like.

    Args:
        model: on meta, or with values, which are copied.
    """
    left_out: dict[int, Any] = {}
    lengths = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList):
            lengths[name] = _length_with_each_kind(part)
            left_out |= {id(layer): nn.Identity() for layer in part[lengths[name] :]}
    copied = copy.deepcopy(model, left_out)
    for name, length in lengths.items():
        if name in dict(copied.named_modules()):
            del copied.get_submodule(name)[length:]  # type: ignore[operator]
    return copied


def fill_randomly(model: nn.Module, device: torch.device) -> nn.Module:
    """Allocate a model on meta and initialize it as its library does; one with values is moved.

    Args:
        model: is changed.
        device: where to allocate.

    Raises:
        ValueError: a tensor has no initializer.
    """
    if not is_meta(model):
        return model.to(device)
    materialize(model, device)
    initialize(model, device=device, seed=0, init=_initializer)
    if missing := uninitialized(model):
        raise ValueError(f"nothing initializes {missing[0]}")
    return model


def _initializer(model: nn.Module) -> InitModule:
    if transformers_model(model)[1] is not None:
        return hugging_face(model)
    initializers = torch_reset(model), torchtitan(model)

    def init(module: nn.Module) -> None:
        for initializer in initializers:
            initializer(module)

    return init


def _length_with_each_kind(layers: nn.ModuleList) -> int:
    kinds = [_kind(layer) for layer in layers]
    return max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)


def _kind(layer: nn.Module) -> str:
    """Return what distinguishes a layer: its modules, and their settings but its number."""
    settings = [
        (path, name, value)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, str | bool | int | float | None)
        and "idx" not in name
        and name != "layer_id"
    ]
    return f"{layer}{settings}"
