"""Gather the tensors of a sharded model on the CPU of the first rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.dtypes import dtype_by_name
from ditty_di.io import is_first_rank
from ditty_di.models.conversion import kept_in_float32
from ditty_di.names import canonical_fqn


def only_part(model_parts: list[nn.Module]) -> nn.Module:
    """Return the only model part.

    Raises:
        ValueError: the model is split into pipeline stages.
    """
    if len(model_parts) != 1:
        raise ValueError(
            f"export: the model is split into {len(model_parts)} pipeline stages; save a "
            f"checkpoint and export that instead: task=export run=FOLDER"
        )
    return model_parts[0]


def gathered(model: nn.Module, dtype: str | None = None) -> dict[str, Tensor] | None:
    """Return whole parameters and persistent buffers on the CPU of the first rank.

    Every rank must call it. Tied parameters come once, under the first of their names, without
    wrappers' segments.

    Args:
        model: may be sharded.
        dtype: name in torch, for floating-point values; None keeps each tensor's own. Parameters
            that transformers never reads in 16 bits keep theirs.

    Returns:
        The tensors by name on the first rank, None on the others.
    """
    wanted = dtype_by_name(dtype) if dtype else None
    is_wide = kept_in_float32(model, wanted) if wanted else None
    keep, found = is_first_rank(), {}
    with torch.no_grad():
        for name, tensor in saved(model):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                casts = is_wide and tensor.is_floating_point() and not is_wide(name)
                # Copied into a plain tensor: the parameter may be a subclass, as for float8.
                copy = torch.empty(whole.shape, dtype=wanted if casts else whole.dtype)
                found[canonical_fqn(name)] = copy.copy_(whole.detach())
    return found if keep else None


def saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of each parameter once, and of the persistent buffers."""
    yield from model.named_parameters()
    persistent = set(model.state_dict())
    yield from ((name, b) for name, b in model.named_buffers() if name in persistent)
