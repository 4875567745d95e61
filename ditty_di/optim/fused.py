"""Skip an update on the device: fused optimizers read a flag there, and the host need not wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def can_skip_on_device(optimizer: Any) -> bool:
    """Return whether an optimizer reads on the device whether to update, as `step_unless` asks it.

    It says so itself: torch's fused optimizers have `_step_supports_amp_scaling` for gradient
    scalers. Every parameter with a gradient needs its state already, which a skipped update would
    leave uninitialized (momentum of SGD) or would make too early.

    Args:
        optimizer: the optimizer, or several in its attribute `optimizers`.
    """
    return all(
        getattr(one, "_step_supports_amp_scaling", False)
        and all(group.get("fused") for group in one.param_groups)
        and all(
            parameter.grad is None or parameter in one.state
            for group in one.param_groups
            for parameter in group["params"]
        )
        for one in _each(optimizer)
    )


def step_unless(optimizer: Any, skip: Tensor) -> None:
    """Update the parameters unless a flag says otherwise, without a wait of the host.

    Args:
        optimizer: one that `can_skip_on_device`.
        skip: 1.0 to change nothing, 0.0 to update; float32 on the device, shape `[]`.
    """
    for one in _each(optimizer):
        one.found_inf = skip
    try:
        optimizer.step()
    finally:
        for one in _each(optimizer):
            del one.found_inf


def _each(optimizer: Any) -> Iterator[Any]:
    if several := getattr(optimizer, "optimizers", ()):
        for one in several:
            yield from _each(one)
    else:
        yield optimizer
