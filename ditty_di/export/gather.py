"""Whole tensors of a sharded model, on the CPU of the first rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ditty_di.io import is_first_rank

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def only_part(model_parts: list[nn.Module]) -> nn.Module:
    """The one model.

    Raises:
        ValueError: a pipeline's stages instead.
    """
    if len(model_parts) != 1:
        raise ValueError(
            f"export: the model is split into {len(model_parts)} pipeline stages; save a "
            f"checkpoint and export that instead: task=export run=FOLDER"
        )
    return model_parts[0]


def gathered(model: nn.Module, dtype: str | None = None) -> dict[str, Tensor] | None:
    """Whole parameters and saved buffers on the CPU, on the first rank; None on other ranks.

    Every rank must call it. Tied parameters come once, under the first of their names, which are
    without wrappers' segments. `dtype` is a name in torch, for floating-point values; None keeps
    each tensor's own, and so do those that transformers never reads in 16 bits.
    """
    import torch
    from torch.distributed.tensor import DTensor

    from ditty_di.names import canonical_fqn

    keep, found, wide = is_first_rank(), {}, _wide(model, dtype)
    with torch.no_grad():
        for name, tensor in saved(model):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                own = wide is not None and wide.search(name)
                found[canonical_fqn(name)] = _copied(whole, None if own else dtype)
    return found if keep else None


def _wide(model: Any, dtype: str | None) -> Any:
    """Pattern of the names that a model of transformers keeps in float32; None without any."""
    import torch

    if dtype is None or not hasattr(model, "_get_dtype_plan"):
        return None
    patterns = list(model._get_dtype_plan(getattr(torch, dtype)))
    if not patterns:
        return None
    from transformers.core_model_loading import build_glob_alternation

    return build_glob_alternation(patterns)[0]


def _copied(tensor: Tensor, dtype: str | None) -> torch.Tensor:
    import torch

    wanted = getattr(torch, dtype) if dtype and tensor.is_floating_point() else tensor.dtype
    copy = torch.empty(tensor.shape, dtype=wanted)
    # Into a plain tensor, whatever subclass the parameter is (torchao's for float8, ...).
    return copy.copy_(tensor.detach())


def saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, each once, and the buffers that a state dict has."""
    yield from model.named_parameters()
    persistent = set(model.state_dict())
    yield from ((name, b) for name, b in model.named_buffers() if name in persistent)
