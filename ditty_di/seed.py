"""The seed of this process's run, for functions that are called without one."""

from __future__ import annotations

import torch

_run_seed: int | None = None


def set_run_seed(seed: int | None) -> None:
    """Record the seed of the current `Runtime`; None when it is closed."""
    global _run_seed
    _run_seed = seed


def run_seed() -> int:
    """Return the seed of the current `Runtime`, or torch's initial seed without one.

    The two differ on pipeline stages, where torch's generator is seeded for each stage.
    """
    return torch.initial_seed() if _run_seed is None else _run_seed
