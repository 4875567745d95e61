"""Copies in host memory that a background save writes while training goes on."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ditty_di.checkpoint.serialization import Entries


class Staging:
    """Copy tensors to host memory that is kept, and used again by the next save.

    Fresh memory costs more than the copy itself, since the system has to map every page. Memory
    for tensors of an accelerator is pinned, so that the copies run at the speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}
        self._copying = False  # from an accelerator, which does not wait for the copies

    def copies(self, states: dict[str, Entries]) -> dict[str, Entries]:
        """Return the entries with copies of their tensors, which the next call overwrites.

        Args:
            states: entries by name of the state.
        """
        before, self._buffers = self._buffers, {}
        copied: dict[str, Entries] = {
            name: {
                key: self._copy((name, key), value, before) if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }
            for name, entries in states.items()
        }
        if self._copying:
            torch.accelerator.synchronize()
            self._copying = False
        return copied

    def _copy(self, key: Hashable, tensor: Tensor, before: dict[Hashable, Tensor]) -> Tensor:
        """Return a copy of a kind that can be saved as the original can.

        A tensor made of tensors (DTensor, torchao's low-bit optimizer states) is copied part by
        part: not every such class can be copied as a whole.
        """
        tensor = tensor.detach()
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            copies = {
                name: self._copy((key, name), part, before) if isinstance(part, Tensor) else part
                for name, part in parts.items()
            }
            return type(tensor).__tensor_unflatten__(
                copies, context, tensor.size(), tensor.stride()
            )
        buffer = before.pop(key, None)
        if buffer is None or not _alike(buffer, tensor):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        self._buffers[key] = buffer
        self._copying = self._copying or tensor.device.type != "cpu"
        return buffer.copy_(tensor, non_blocking=True)


def _alike(buffer: Tensor, tensor: Tensor) -> bool:
    same_layout = buffer.shape == tensor.shape and buffer.stride() == tensor.stride()
    return same_layout and buffer.dtype == tensor.dtype
