"""Learning-rate schedules: warm-up, then a curve with a floor.

Everywhere `step` counts optimizer updates from 0, and the factor multiplies each parameter group's
own initial learning rate (its peak), so groups with rates of their own keep their ratio.

- Warm-up is linear, `(step + 1) / warmup_steps`: the first update has a rate above 0, update
  `warmup_steps - 1` is the first one at the peak, and 0 warm-up steps mean none.
- A decay over `d` updates is at progress `i / d` in its i-th update (from 0). It starts at the
  peak, its last update (`total_steps - 1`) is one step before the floor, and `step = total_steps`
  is exactly the floor. So no update of a run has a rate of 0, even with `floor=0`.
- `floor` bounds the decay, as a fraction of the peak (not the warm-up, which rises from near 0).
- A run that is extended past `total_steps` holds the floor (the peak, where nothing decays).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ditty_di.data.loader import horizon
from ditty_di.protocols import early_checks

#: A decay's shape: progress in [0, 1] -> 1 at progress 0, falling to 0 at progress 1.
Shape = Callable[[float], float]


def linear_decay(progress: float, /) -> float:
    """`1 - p`."""
    return 1.0 - progress


def cosine_decay(progress: float, /) -> float:
    """`(1 + cos(pi p)) / 2`, half a period (SGDR, arXiv 1608.03983, eq. 5 without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def sqrt_decay(progress: float, /) -> float:
    """`1 - sqrt(p)`, the "1-sqrt" cool-down of arXiv 2405.18392."""
    return 1.0 - math.sqrt(progress)


def exponential_decay(progress: float, /) -> float:
    """`(e^(1 - p) - 1) / (e - 1)`: one e-folding, shifted and scaled to end at exactly 0.

    With a floor f this is dolomite-engine's `ExponentialScheduler`, `a e^-p + b` with
    `a = (1 - f) e / (e - 1)` and `b = (f e - 1) / (e - 1)`.
    """
    return math.expm1(1.0 - progress) / math.expm1(1.0)


class Schedule(LambdaLR):
    """Every group's rate is its initial rate times `factor(step)`.

    The state is the position alone: the curve and the peaks are configuration. A run resumed with
    another `total_steps`, `anneal_start` or learning rate therefore follows the new curve from the
    step that it had reached. Loading also sets the optimizer's rates, so that the first update
    after it is right even when the optimizer's own state is not loaded; load it after that state.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.factor = factor
        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        factor = self.factor(self.last_epoch)
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):  # compiled and capturable steps hold on to it
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
        self._last_lr = [peak * factor for peak in self.base_lrs]


@dataclass(frozen=True)
class WarmupStableDecay:
    """1 between warm-up and decay; `floor + (1 - floor) * shape(progress)` in the decay."""

    total_steps: int
    warmup_steps: int
    decay_steps: int
    floor: float
    shape: Shape

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        into_decay = step - (self.total_steps - self.decay_steps)
        if into_decay < 0 or not self.decay_steps:
            return 1.0
        progress = min(1.0, into_decay / self.decay_steps)
        return self.floor + (1.0 - self.floor) * self.shape(progress)


@dataclass(frozen=True)
class Power:
    """`min(1, scale * tokens^exponent)`, then a decay from where that has come to."""

    total_steps: int
    warmup_steps: int
    decay_steps: int
    floor: float
    shape: Shape
    scale: float
    exponent: float
    tokens_per_step: int

    def _power_law(self, step: int) -> float:
        tokens = (step + 1) * self.tokens_per_step
        return max(self.floor, min(1.0, self.scale * tokens**self.exponent))

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            reached = self._power_law(self.warmup_steps - 1)
            return reached * (step + 1) / self.warmup_steps
        decay_start = self.total_steps - self.decay_steps
        if step < decay_start or not self.decay_steps:
            return self._power_law(step)
        progress = min(1.0, (step - decay_start) / self.decay_steps)
        return self.floor + (self._power_law(decay_start) - self.floor) * self.shape(progress)


@dataclass(frozen=True)
class Infinite:
    """Cosine from 1 to `constant_factor`, constant, exponential to `floor`."""

    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    constant_factor: float
    anneal_start: int | None
    floor: float

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        into_cooldown = step - self.warmup_steps
        if into_cooldown < self.cooldown_steps:
            fall = cosine_decay(into_cooldown / self.cooldown_steps)
            return self.constant_factor + (1.0 - self.constant_factor) * fall
        if self.anneal_start is None or step < self.anneal_start:
            return self.constant_factor
        progress = min(1.0, (step - self.anneal_start) / (self.total_steps - self.anneal_start))
        return self.constant_factor * (self.floor / self.constant_factor) ** progress


def _check(*, total_steps: int, floor: float = 0.0, **phases: int) -> None:
    """Raises unless the phases are whole numbers of updates that fit into the run."""
    if total_steps < 1 or total_steps != int(total_steps):
        raise ValueError(
            f"lr_scheduler: total_steps={total_steps}; write the run's number of updates, a whole "
            f"number of at least 1 (in YAML: total_steps: ${{horizon}})"
        )
    for name, steps in phases.items():
        if steps < 0 or steps != int(steps):
            raise ValueError(
                f"lr_scheduler: {name}={steps}; write a whole number of updates, 0 or more "
                f"(a tenth of this run is {name}={total_steps // 10})"
            )
    if sum(phases.values()) > total_steps:
        written = " + ".join(f"{name}={steps}" for name, steps in phases.items())
        raise ValueError(
            f"lr_scheduler: {written} is longer than the run (total_steps={total_steps}); write "
            f"phases of {total_steps} updates or less together, or train for longer"
        )
    if not 0.0 <= floor <= 1.0:
        raise ValueError(
            f"lr_scheduler: floor={floor}; write the lowest rate as a fraction of the peak, "
            f"between 0 and 1 (floor=0.1 decays to a tenth of each group's lr)"
        )


def _validate(
    *,
    total_steps: Any = None,
    floor: Any = 0.0,
    warmup_steps: Any = 0,
    decay_steps: Any = 0,
    cooldown_steps: Any = 0,
) -> None:
    """Check the phases that are known before anything is built (`ditty_di.config.View`)."""
    total = _known(total_steps)
    known = {"warmup_steps": warmup_steps, "decay_steps": decay_steps}
    known["cooldown_steps"] = cooldown_steps
    phases = {name: steps for name, value in known.items() if (steps := _known(value))}
    if total is not None and total < 1:  # which is said where the number of steps is given
        return
    lowest = floor if isinstance(floor, int | float) else 0.0
    _check(total_steps=sys.maxsize if total is None else total, floor=lowest, **phases)  # type: ignore[arg-type]


def _known(value: Any) -> int | float | None:
    """A number of steps; of a view, what it would come to: the run's `steps`, or arithmetic."""
    if isinstance(value, int | float):
        return value
    arguments = getattr(value, "arguments", {})
    if getattr(value, "target", None) is horizon:
        return _known(arguments.get("steps"))
    if getattr(getattr(value, "target", None), "__module__", "") == "_operator":
        numbers = [_known(argument) for argument in arguments.values()]
        if None not in numbers:
            return _known(value.target(*numbers))
    return None


@early_checks(validate=_validate)
def constant(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Warm-up, then each group's initial rate for good (also past `total_steps`).

    Raises:
        ValueError: a phase that is negative, no whole number, or longer than the run.
    """
    _check(total_steps=total_steps, warmup_steps=warmup_steps)
    return Schedule(
        optimizer, WarmupStableDecay(total_steps, warmup_steps, 0, 1.0, shape=linear_decay)
    )


@early_checks(validate=_validate)
def wsd(
    optimizer: Optimizer,
    *,
    total_steps: int,
    decay_steps: int,
    warmup_steps: int = 0,
    floor: float = 0.0,
    shape: Shape = sqrt_decay,
) -> Schedule:
    """Warm-up, stable at the peak, decay over the last `decay_steps` updates.

    WSD is from MiniCPM (arXiv 2404.06395); the default 1-sqrt shape is the best of those compared
    in arXiv 2405.18392. `shape` is any function of the decay's progress: `linear_decay`,
    `cosine_decay`, `sqrt_decay`, `exponential_decay`, or one's own. With another shape this is also
    dolomite-engine's warm-up + constant + decay (`num_constant_steps`, `num_decay_steps`).

    Raises:
        ValueError: phases that do not fit into the run; a floor outside [0, 1].
    """
    _check(total_steps=total_steps, floor=floor, warmup_steps=warmup_steps, decay_steps=decay_steps)
    return Schedule(
        optimizer, WarmupStableDecay(total_steps, warmup_steps, decay_steps, floor, shape)
    )


def _decay_after_warmup(
    optimizer: Optimizer, total_steps: int, warmup_steps: int, floor: float, shape: Shape
) -> Schedule:
    _check(total_steps=total_steps, floor=floor, warmup_steps=warmup_steps)
    decay_steps = total_steps - warmup_steps
    return Schedule(
        optimizer, WarmupStableDecay(total_steps, warmup_steps, decay_steps, floor, shape)
    )


@early_checks(validate=_validate)
def linear(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> Schedule:
    """Warm-up, then a straight line from the peak to `floor` times it.

    Raises:
        ValueError: a warm-up longer than the run; a floor outside [0, 1].
    """
    return _decay_after_warmup(optimizer, total_steps, warmup_steps, floor, linear_decay)


@early_checks(validate=_validate)
def cosine(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> Schedule:
    """Warm-up, then half a cosine from the peak to `floor` times it (see `cosine_decay`).

    Raises:
        ValueError: a warm-up longer than the run; a floor outside [0, 1].
    """
    return _decay_after_warmup(optimizer, total_steps, warmup_steps, floor, cosine_decay)


@early_checks(validate=_validate)
def exponential(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> Schedule:
    """Warm-up, then dolomite-engine's exponential decay (see `exponential_decay`).

    Unlike there it stops at the floor when a run is extended, instead of falling below it.

    Raises:
        ValueError: a warm-up longer than the run; a floor outside [0, 1].
    """
    return _decay_after_warmup(optimizer, total_steps, warmup_steps, floor, exponential_decay)


@early_checks(validate=_validate)
def power(
    optimizer: Optimizer,
    *,
    total_steps: int,
    batch_size: int,
    seq_len: int,
    a: float = 4.6,
    b: float = -0.51,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    floor: float = 0.0,
    shape: Shape = linear_decay,
    reference_lr: float | None = None,
) -> Schedule:
    """`lr = min(peak, batch_size * a * tokens^b)`: needs no horizon until a decay is wanted.

    Power Scheduler (arXiv 2408.13359), where `tokens` is what the run has seen with this update,
    `(step + 1) * batch_size * seq_len`, and a=4.6, b=-0.51 are the paper's fit (under muP).
    dolomite-engine's `PowerScheduler` writes it `min(1, a' / lr * (c * n)^b)`: its `a'` is
    `a * batch_size`, its `c` is `batch_size * seq_len`. Warm-up rises to where the law stands at
    its end; a decay over the last `decay_steps` falls from where the law stands at its start to
    the floor. Without one (`decay_steps=0`) the law goes on past `total_steps`, down to the floor.

    Args:
        batch_size: sequences an update, over all ranks and accumulation.
        seq_len: tokens a sequence.
        reference_lr: the peak that the law is compared with; the first group's initial rate when
            None. All groups share one factor, so their ratio stays.

    Raises:
        ValueError: phases that do not fit into the run; a floor outside [0, 1]; a rate, size or
            `a` that is not positive; a positive `b`.
    """
    _check(total_steps=total_steps, floor=floor, warmup_steps=warmup_steps, decay_steps=decay_steps)
    first = optimizer.param_groups[0]
    if reference_lr is None:
        # A scheduler may have been built on this optimizer before: its peak is the initial rate.
        reference_lr = float(first["initial_lr"] if "initial_lr" in first else first["lr"])
    for name, value in {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "a": a,
        "reference_lr": reference_lr,
    }.items():
        if not value > 0:
            raise ValueError(f"lr_scheduler: {name}={value}; write a number above 0")
    if b > 0:
        raise ValueError(f"lr_scheduler: b={b}; write an exponent of 0 or less, such as -0.51")
    law = Power(
        total_steps,
        warmup_steps,
        decay_steps,
        floor,
        shape,
        scale=a * batch_size / reference_lr,
        exponent=b,
        tokens_per_step=batch_size * seq_len,
    )
    return Schedule(optimizer, law)


@early_checks(validate=_validate)
def infinite(
    optimizer: Optimizer,
    *,
    total_steps: int,
    cooldown_steps: int,
    warmup_steps: int = 0,
    constant_factor: float = 0.5,
    anneal_start: int | None = None,
    floor: float = 0.1,
) -> Schedule:
    """Warm-up, cosine cool-down to a constant rate for as long as wanted, then annealing.

    Infinite learning rates (arXiv 2403.08763, and eq. 1 of arXiv 2503.02844). Without
    `anneal_start` the rate stays at `constant_factor` times the peak, also past `total_steps`. To
    finish, resume with `anneal_start` at a step of the constant phase and `total_steps` where the
    run shall end: `constant_factor * (floor / constant_factor) ** progress`, at `floor` when
    `step = total_steps`. (2503.02844 has the annealing's length grow with the step it starts at;
    here it ends with the run.)

    Args:
        cooldown_steps: updates of the cosine from the peak to the constant rate.
        constant_factor: the constant rate as a fraction of the peak.
        anneal_start: the first update of the annealing.

    Raises:
        ValueError: phases that overlap or do not fit; factors that are not
            `0 < floor <= constant_factor <= 1`.
    """
    _check(
        total_steps=total_steps,
        floor=floor,
        warmup_steps=warmup_steps,
        cooldown_steps=cooldown_steps,
    )
    if not 0.0 < floor <= constant_factor <= 1.0:
        raise ValueError(
            f"lr_scheduler: floor={floor}, constant_factor={constant_factor}; write fractions of "
            f"the peak with 0 < floor <= constant_factor <= 1 (an exponential never reaches 0)"
        )
    if not cooldown_steps and constant_factor < 1.0:
        raise ValueError(
            f"lr_scheduler: cooldown_steps=0 would drop the rate to constant_factor="
            f"{constant_factor} at once; write at least 1 update, or constant_factor=1.0"
        )
    begins = warmup_steps + cooldown_steps
    if anneal_start is not None and not begins <= anneal_start < total_steps:
        raise ValueError(
            f"lr_scheduler: anneal_start={anneal_start}; write a step of the constant phase, from "
            f"{begins} (warmup_steps + cooldown_steps) to {total_steps - 1} (total_steps - 1)"
        )
    return Schedule(
        optimizer,
        Infinite(total_steps, warmup_steps, cooldown_steps, constant_factor, anneal_start, floor),
    )
