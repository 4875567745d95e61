"""Evaluation mode of modules, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def evaluating(parts: Iterable[Any]) -> Iterator[None]:
    """Set evaluation mode, and restore every module's training flag and sharding afterwards.

    Args:
        parts: modules; other objects are ignored.
    """
    modules = [part for part in parts if isinstance(part, nn.Module)]
    flags = [(m, m.training) for part in modules for m in part.modules()]
    try:
        for part in modules:
            part.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
            # Without a backward pass the outermost FSDP modules would stay gathered, and
            # `parameters()` would be whole tensors instead of shards.
            if isinstance(module, FSDPModule):
                module.reshard()
