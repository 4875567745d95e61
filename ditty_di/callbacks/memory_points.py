"""The memory at fixed points of the first optimizer step."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from ditty_di.callbacks.base import Observer
from ditty_di.io import read_text
from ditty_di.protocols import Training

GIB = 1 << 30


class MemoryPoints(Observer):
    """Log once what this rank's memory holds after the model, forward, backward and the update.

    The metrics, in GiB and with the first report: `memory/model_gib` (the model and whatever else
    was built), `memory/forward_gib` (after the first forward pass), `memory/backward_gib` (before
    the first update: gradients, clipped) and `memory/update_gib` (after it: the optimizer's state).
    On CUDA they are the bytes of tensors, on a CPU the resident memory of the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._points: dict[str, float] = {}
        self._device = torch.device("cpu")

    def on_train_start(self, trainer: Training) -> None:
        """Note the memory, and watch the first step.

        Args:
            trainer: the trainer.
        """
        self._device, self._points = trainer.device, {}
        self._note("model")()
        model = trainer.model_parts[-1]
        if getattr(model, "_compiled_call_impl", None) is None:  # it would be compiled again
            self._hooks = [model.register_forward_hook(self._note("forward"))]
        self._hooks += [
            trainer.optimizer.register_step_pre_hook(self._note("backward")),
            trainer.optimizer.register_step_post_hook(self._note("update")),
        ]

    def get_metrics(self) -> dict[str, float]:
        """Return the memory at all points, once; watch no longer."""
        if "update" not in self._points:
            return {}
        found, self._points = self._points, {}
        self._remove_hooks()
        return {f"memory/{name}_gib": size for name, size in found.items()}

    def _note(self, name: str) -> Callable[..., None]:
        def note(*ignored: Any) -> None:
            training = name != "forward" or torch.is_grad_enabled()  # not in a validation
            if training and name not in self._points:
                self._points[name] = allocated(self._device) / GIB

        return note


def allocated(device: torch.device) -> float:
    """Return the bytes that tensors take on a device; on a CPU those of the process.

    Args:
        device: of this rank.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if pages := read_text("/proc/self/statm").split():
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024
