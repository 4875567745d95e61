"""The seed of this process's run, and random number generators that are restored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
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


def derived_seed(seed: int, name: str) -> int:
    """Return a seed that depends on a seed and a name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on a seed and a name only."""
    return torch.Generator().manual_seed(derived_seed(seed, name))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of a device.

    `torch.manual_seed` seeds those of all devices. For each kind of device that is not in use it
    formats a stack trace, which takes longer than the initialization of a small module.

    Args:
        seed: of both.
        device: of the tensors that are drawn.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Restore the random number generators of Python, NumPy and torch afterwards.

    Args:
        device: accelerator whose generator is restored beside the CPU's; None or the CPU: none.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device is None or device.type == "cpu" else [device]
    device_type = devices[0].type if devices else "cuda"  # not looked at without devices
    try:
        with torch.random.fork_rng(devices=devices, device_type=device_type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
