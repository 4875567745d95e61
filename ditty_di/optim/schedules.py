"""Learning-rate schedules: a linear warmup, a stable phase, and a decay to a minimum.

`step` counts optimizer updates from 0. The factor of a step multiplies the initial learning rate
(the peak) of each parameter group, so groups with different rates keep their ratio.

- Warmup is linear, `(step + 1) / warmup_steps`: the first update has a rate above 0, and update
  `warmup_steps - 1` is the first at the peak.
- A decay over `d` updates has progress `i / d` in its i-th update (from 0). It starts at the peak,
  and `step = max_steps` is exactly the minimum. No update of a run has a rate of 0.
- A run that is extended past `max_steps` keeps the minimum.
- The length of a phase is given as in `ditty_di.optim.phases`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ditty_di.optim.phases import phases, validate_phases
from ditty_di.protocols import early_checks

#: Shape of a decay: maps progress in [0, 1] to 1 at progress 0, falling to 0 at progress 1.
Shape = Callable[[float], float]
#: Factor of the learning rate at a step.
Factor = Callable[[int], float]


def linear_decay(progress: float, /) -> float:
    """Return `1 - p`."""
    return 1.0 - progress


def cosine_decay(progress: float, /) -> float:
    """Return `(1 + cos(pi p)) / 2`, half a period (SGDR, arXiv 1608.03983, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def sqrt_decay(progress: float, /) -> float:
    """Return `1 - sqrt(p)`, the "1-sqrt" cooldown of arXiv 2405.18392."""
    return 1.0 - math.sqrt(progress)


def exponential_decay(progress: float, /) -> float:
    """Return `(e^(1 - p) - 1) / (e - 1)`: `e^-p`, shifted and scaled to end at exactly 0.

    With a minimum m this is dolomite-engine's `ExponentialScheduler`, `a e^-p + b` with
    `a = (1 - m) e / (e - 1)` and `b = (m e - 1) / (e - 1)`.
    """
    return math.expm1(1.0 - progress) / math.expm1(1.0)


class Schedule(LambdaLR):
    """Multiply the initial rate of every parameter group by `factor(step)`.

    The state is the step alone; the curve and the peaks are configuration. A run resumed with
    another `max_steps` or learning rate follows the new curve from the step it had reached.
    Loading also sets the optimizer's rates, so load it after the optimizer's state.
    """

    def __init__(self, optimizer: Optimizer, factor: Factor) -> None:
        self.factor = factor
        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates so far."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved step, and set the optimizer's rates."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        factor = self.factor(self.last_epoch)
        self._last_lr = [peak * factor for peak in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # compiled and capturable steps keep the tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _peak(step: int) -> float:
    return 1.0


def _schedule(
    optimizer: Optimizer,
    max_steps: int,
    warmup: int,
    decay: int = 0,
    min_lr_ratio: float = 0.0,
    shape: Shape = linear_decay,
    stable: Factor = _peak,
) -> Schedule:
    """Return warmup to `stable`, `stable` itself, and a decay from it over the last updates."""

    def factor(step: int) -> float:
        if step < warmup:
            return stable(warmup - 1) * (step + 1) / warmup
        start = max_steps - decay
        if step < start or not decay:
            return stable(step)
        progress = min(1.0, (step - start) / decay)
        return min_lr_ratio + (stable(start) - min_lr_ratio) * shape(progress)

    return Schedule(optimizer, factor)


@early_checks(validate=validate_phases)
def constant(
    optimizer: Optimizer,
    *,
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
) -> Schedule:
    """Return a warmup followed by the constant peak, also past `max_steps`.

    Args:
        optimizer: its groups' initial rates are the peaks.
        max_steps: updates of the run.
        warmup_steps: updates of the warmup; None takes `warmup_ratio`.
        warmup_ratio: length of the warmup as a fraction of the run.

    Raises:
        ValueError: a phase that is negative, not a whole number, or longer than the run.
    """
    (warmup,) = phases(max_steps, warmup=(warmup_steps, warmup_ratio))
    return _schedule(optimizer, max_steps, warmup)


@early_checks(validate=validate_phases)
def wsd(
    optimizer: Optimizer,
    *,
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    decay_steps: int | None = None,
    decay_ratio: float = 0.2,
    min_lr_ratio: float = 0.0,
    shape: Shape = sqrt_decay,
) -> Schedule:
    """Return warmup, the stable peak, and a decay over the last updates (WSD).

    WSD is from MiniCPM (arXiv 2404.06395); the default 1-sqrt shape is the best of those compared
    in arXiv 2405.18392. With another shape this is also dolomite-engine's warmup, constant and
    decay (`num_constant_steps`, `num_decay_steps`).

    Args:
        optimizer: its groups' initial rates are the peaks.
        max_steps: updates of the run.
        warmup_steps: updates of the warmup; None takes `warmup_ratio`.
        warmup_ratio: length of the warmup as a fraction of the run.
        decay_steps: updates of the decay; None takes `decay_ratio`.
        decay_ratio: length of the decay as a fraction of the run.
        min_lr_ratio: lowest rate of the decay, as a fraction of the peak.
        shape: function of the decay's progress: `linear_decay`, `cosine_decay`, `sqrt_decay`,
            `exponential_decay`, or your own.

    Raises:
        ValueError: phases that do not fit into the run; a minimum outside [0, 1].
    """
    warmup, decay = phases(
        max_steps,
        min_lr_ratio,
        warmup=(warmup_steps, warmup_ratio),
        decay=(decay_steps, decay_ratio),
    )
    return _schedule(optimizer, max_steps, warmup, decay, min_lr_ratio, shape)


def _decay_after_warmup(shape: Shape, summary: str) -> Callable[..., Schedule]:
    """Return a schedule that decays from the end of the warmup to the end of the run."""

    def schedule(
        optimizer: Optimizer,
        *,
        max_steps: int,
        warmup_steps: int | None = None,
        warmup_ratio: float = 0.0,
        min_lr_ratio: float = 0.0,
    ) -> Schedule:
        (warmup,) = phases(max_steps, min_lr_ratio, warmup=(warmup_steps, warmup_ratio))
        return _schedule(optimizer, max_steps, warmup, max_steps - warmup, min_lr_ratio, shape)

    schedule.__name__ = schedule.__qualname__ = shape.__name__.removesuffix("_decay")
    schedule.__doc__ = f"{summary}\n\n{_AFTER_WARMUP}"
    return early_checks(validate=validate_phases)(schedule)


_AFTER_WARMUP = """\
    Args:
        optimizer: its groups' initial rates are the peaks.
        max_steps: updates of the run.
        warmup_steps: updates of the warmup; None takes `warmup_ratio`.
        warmup_ratio: length of the warmup as a fraction of the run.
        min_lr_ratio: lowest rate of the decay, as a fraction of the peak.

    Raises:
        ValueError: a warmup longer than the run; a minimum outside [0, 1].
"""

linear = _decay_after_warmup(
    linear_decay, "Return a warmup, then a straight line from the peak to the minimum."
)
cosine = _decay_after_warmup(
    cosine_decay, "Return a warmup, then half a cosine from the peak to the minimum."
)
exponential = _decay_after_warmup(
    exponential_decay,
    "Return a warmup, then dolomite-engine's exponential decay (see `exponential_decay`).",
)


@early_checks(validate=validate_phases)
def power(
    optimizer: Optimizer,
    *,
    max_steps: int,
    batch_size: int,
    seq_len: int,
    a: float = 4.6,
    b: float = -0.51,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    decay_steps: int | None = None,
    decay_ratio: float = 0.0,
    min_lr_ratio: float = 0.0,
    shape: Shape = linear_decay,
    reference_lr: float | None = None,
) -> Schedule:
    """Return `lr = min(peak, batch_size * a * tokens^b)`, with a warmup and an optional decay.

    Power Scheduler (arXiv 2408.13359), where `tokens` counts what the run has seen with this
    update, `(step + 1) * batch_size * seq_len`, and a=4.6, b=-0.51 are the paper's fit (under muP).
    dolomite-engine's `PowerScheduler` writes it `min(1, a' / lr * (c * n)^b)`: its `a'` is
    `a * batch_size`, its `c` is `batch_size * seq_len`. The warmup rises to the value of the law
    at its end; a decay falls from the value of the law at its start. Without a decay the law
    continues past `max_steps`, down to the minimum.

    Args:
        optimizer: its groups' initial rates are the peaks.
        max_steps: updates of the run.
        batch_size: sequences in an update, over all ranks and accumulation.
        seq_len: tokens in a sequence.
        a: factor of the law, in units of the learning rate.
        b: exponent of the law, 0 or less.
        warmup_steps: updates of the warmup; None takes `warmup_ratio`.
        warmup_ratio: length of the warmup as a fraction of the run.
        decay_steps: updates of the decay; None takes `decay_ratio`.
        decay_ratio: length of the decay as a fraction of the run; 0 means no decay.
        min_lr_ratio: lowest rate, as a fraction of the peak.
        shape: function of the decay's progress.
        reference_lr: peak that the law is compared with; None takes the first group's initial
            rate. All groups share one factor, so they keep their ratio.

    Raises:
        ValueError: phases that do not fit into the run; a minimum outside [0, 1]; a rate, size or
            `a` that is not positive; a positive `b`.
    """
    warmup, decay = phases(
        max_steps,
        min_lr_ratio,
        warmup=(warmup_steps, warmup_ratio),
        decay=(decay_steps, decay_ratio),
    )
    if reference_lr is None:
        # A scheduler may have been built on this optimizer before: its peak is `initial_lr`.
        first = optimizer.param_groups[0]
        reference_lr = float(first["initial_lr"] if "initial_lr" in first else first["lr"])
    positive = {"batch_size": batch_size, "seq_len": seq_len, "a": a, "reference_lr": reference_lr}
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"lr_scheduler: {name}={value}; write a number above 0")
    if b > 0:
        raise ValueError(f"lr_scheduler: b={b}; write an exponent of 0 or less, such as -0.51")
    scale, tokens_per_step = a * batch_size / reference_lr, batch_size * seq_len

    def power_law(step: int) -> float:
        tokens = (step + 1) * tokens_per_step
        return max(min_lr_ratio, min(1.0, scale * tokens**b))

    return _schedule(optimizer, max_steps, warmup, decay, min_lr_ratio, shape, power_law)


@early_checks(validate=validate_phases)
def infinite(
    optimizer: Optimizer,
    *,
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    cooldown_steps: int | None = None,
    cooldown_ratio: float = 0.5,
    constant_factor: float = 0.5,
    anneal_start: int | None = None,
    min_lr_ratio: float = 0.1,
) -> Schedule:
    """Return warmup, a cosine cooldown to a constant rate, and an optional annealing at the end.

    Infinite learning rates (arXiv 2403.08763, and eq. 1 of arXiv 2503.02844). Without
    `anneal_start` the rate stays at `constant_factor` times the peak, also past `max_steps`. To
    finish a run, resume with `anneal_start` at a step of the constant phase and `max_steps`
    where the run shall end: `constant_factor * (min_lr_ratio / constant_factor) ** progress`. (In
    2503.02844 the length of the annealing grows with its first step; here it ends with the run.)

    Args:
        optimizer: its groups' initial rates are the peaks.
        max_steps: updates of the run.
        warmup_steps: updates of the warmup; None takes `warmup_ratio`.
        warmup_ratio: length of the warmup as a fraction of the run.
        cooldown_steps: updates of the cosine from the peak to the constant rate; None takes
            `cooldown_ratio`.
        cooldown_ratio: length of the cooldown as a fraction of the run.
        constant_factor: the constant rate as a fraction of the peak.
        anneal_start: first update of the annealing; None never anneals.
        min_lr_ratio: last rate of the annealing, as a fraction of the peak.

    Raises:
        ValueError: phases that overlap or do not fit; factors that are not
            `0 < min_lr_ratio <= constant_factor <= 1`.
    """
    warmup, cooldown = phases(
        max_steps,
        min_lr_ratio,
        warmup=(warmup_steps, warmup_ratio),
        cooldown=(cooldown_steps, cooldown_ratio),
    )
    if not 0.0 < min_lr_ratio <= constant_factor <= 1.0:
        raise ValueError(
            f"lr_scheduler: min_lr_ratio={min_lr_ratio}, constant_factor={constant_factor}; write "
            f"fractions of the peak with 0 < min_lr_ratio <= constant_factor <= 1 (an exponential "
            f"never reaches 0)"
        )
    if not cooldown and constant_factor < 1.0:
        raise ValueError(
            f"lr_scheduler: cooldown_steps=0 would drop the rate to constant_factor="
            f"{constant_factor} at once; write at least 1 update, or constant_factor=1.0"
        )
    begins = warmup + cooldown
    if anneal_start is not None and not begins <= anneal_start < max_steps:
        raise ValueError(
            f"lr_scheduler: anneal_start={anneal_start}; write a step of the constant phase, from "
            f"{begins} (warmup_steps + cooldown_steps) to {max_steps - 1} (max_steps - 1)"
        )

    def level(step: int) -> float:
        into_cooldown = step - warmup
        if into_cooldown < 0:
            return 1.0
        if into_cooldown < cooldown:
            fall = cosine_decay(into_cooldown / cooldown)
            return constant_factor + (1.0 - constant_factor) * fall
        if anneal_start is None or step < anneal_start:
            return constant_factor
        progress = min(1.0, (step - anneal_start) / (max_steps - anneal_start))
        return float(constant_factor * (min_lr_ratio / constant_factor) ** progress)

    return _schedule(optimizer, max_steps, warmup, stable=level)
