"""Lengths of the phases of a learning-rate schedule.

The length of a phase is given in updates (`warmup_steps`) or as a fraction of the run
(`warmup_ratio`, rounded down). The number of updates wins where both are given.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import Any

from ditty_di.data.loader import training_steps


def phases(
    max_steps: int, min_lr_ratio: float = 0.0, **given: tuple[int | None, float]
) -> list[int]:
    """Return the number of updates of each phase.

    Args:
        max_steps: updates of the run.
        min_lr_ratio: lowest rate, as a fraction of the peak.
        **given: by name of the phase, its updates (None takes the ratio), and its fraction of the
            run.

    Raises:
        ValueError: numbers out of range, or phases that are longer than the run.
    """
    if max_steps < 1 or max_steps != int(max_steps):
        raise ValueError(
            f"lr_scheduler: max_steps={max_steps}; write the run's number of updates, a whole "
            f"number of at least 1 (in YAML: max_steps: ${{training_steps}})"
        )
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(
            f"lr_scheduler: min_lr_ratio={min_lr_ratio}; write the lowest rate as a fraction of "
            f"the peak, between 0 and 1 (min_lr_ratio=0.1 decays to a tenth of each group's lr)"
        )
    found: dict[str, int] = {}
    for name, (steps, ratio) in given.items():
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(
                f"lr_scheduler: {name}_ratio={ratio}; write a fraction of the run between 0 and 1"
            )
        if steps is None:  # exact, where 0.29 * 100 would be below 29
            steps = int(Fraction(str(ratio)) * max_steps)
        if steps < 0 or steps != int(steps):
            raise ValueError(
                f"lr_scheduler: {name}_steps={steps}; write a whole number of updates, 0 or more "
                f"(a tenth of this run is {name}_steps={max_steps // 10})"
            )
        found[f"{name}_steps"] = steps
    if sum(found.values()) > max_steps:
        written = " + ".join(f"{name}={steps}" for name, steps in found.items() if steps)
        raise ValueError(
            f"lr_scheduler: {written} is longer than the run (max_steps={max_steps}); write "
            f"phases of {max_steps} updates or less together, or train for longer"
        )
    return list(found.values())


def validate_phases(
    *,
    max_steps: Any = None,
    min_lr_ratio: Any = 0.0,
    warmup_steps: Any = None,
    warmup_ratio: Any = 0.0,
    decay_steps: Any = None,
    decay_ratio: Any = 0.0,
    cooldown_steps: Any = None,
    cooldown_ratio: Any = 0.0,
) -> None:
    """Check the phases that are known before anything is built (`ditty_di.config.View`)."""
    if getattr(max_steps, "target", None) is training_steps:
        max_steps = max_steps.arguments.get("max_steps")
    total: Any = max_steps if isinstance(max_steps, int | float) else sys.maxsize
    if total < 1:  # reported where the number of steps is given
        return
    given_phases = {
        "warmup": (warmup_steps, warmup_ratio),
        "decay": (decay_steps, decay_ratio),
        "cooldown": (cooldown_steps, cooldown_ratio),
    }
    known = {
        name: given
        for name, given in given_phases.items()
        if all(value is None or isinstance(value, int | float) for value in given)
    }
    phases(total, min_lr_ratio if isinstance(min_lr_ratio, int | float) else 0.0, **known)
