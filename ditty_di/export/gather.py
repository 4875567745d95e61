"""Whole tensors of a sharded model, on the CPU of the first rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def is_first_rank() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


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
    each tensor's own.
    """
    import torch
    from torch.distributed.tensor import DTensor

    from ditty_di.names import canonical_fqn

    keep, found = is_first_rank(), {}
    with torch.no_grad():
        for name, tensor in saved(model):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                found[canonical_fqn(name)] = _copied(whole, dtype)
    return found if keep else None


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
