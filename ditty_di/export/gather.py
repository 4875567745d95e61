"""Gather the tensors of a sharded model on the CPU of the first rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.dtypes import dtype_by_name
from ditty_di.fqn import canonical_fqn
from ditty_di.io import is_first_rank
from ditty_di.models.conversion import kept_in_float32
from ditty_di.models.skipped import skipped_paths
from ditty_di.models.weights import materialize, tensors
from ditty_di.parallelize.pipeline import ModelParts


def only_part(model_parts: list[nn.Module]) -> nn.Module:
    """Return the only model part.

    Raises:
        ValueError: the model is split into pipeline stages.
    """
    if len(model_parts) != 1 or skipped_paths(model_parts[0]):
        raise ValueError(
            "export: the model is split into pipeline stages; pass what `whole_models` puts "
            "together, or export a checkpoint: task=export run=FOLDER"
        )
    return model_parts[0]


def whole_models(parts: ModelParts) -> Iterator[list[nn.Module]]:
    """Yield what an export is called with on this rank: the model as it is, or put together.

    Of pipeline stages the first rank gets the whole model on the CPU, from a rank of each stage,
    and the others nothing. Every rank must call it.

    Args:
        parts: the model as this rank trains it.

    Yields:
        Modules for an export, once at most.
    """
    if parts.whole is None:
        yield parts.modules
        return
    ranks = dist.get_process_group_ranks(parts.group)
    here: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in chain.from_iterable(map(tensors, parts.modules)):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks[0] == 0:  # other pipelines have the same
                here[canonical_fqn(name)] = whole.detach().cpu()
    if ranks[0]:
        return
    found: list[Any] = [None] * len(ranks)
    dist.all_gather_object(
        found, {name: (t.shape, t.dtype) for name, t in here.items()}, group=parts.group
    )
    for source, shapes in enumerate(found[1:], 1):
        for name, (shape, dtype) in shapes.items():
            if source == dist.get_rank(parts.group):
                dist.send(here[name].contiguous(), group=parts.group, group_dst=0)
            elif is_first_rank():
                here[name] = torch.empty(shape, dtype=dtype)
                dist.recv(here[name], group=parts.group, group_src=source)
    if is_first_rank():
        model = copy.deepcopy(parts.whole)
        materialize(model, torch.device("cpu"))
        with torch.no_grad():
            for name, tensor in tensors(model):
                tensor.copy_(here.pop(canonical_fqn(name)))
        yield [model]


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
