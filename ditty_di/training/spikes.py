"""Skip optimizer steps whose loss or gradient norm is far above those of the steps before."""

# No `from __future__ import annotations`: constructors of dataclasses keep real annotations.
import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from ditty_di.messages import refuse

log = logging.getLogger(__name__)

_WATCHED = ("loss", "grad_norm")


@dataclass(kw_only=True, eq=False)
class RunningLimit(ABC):
    """Limit loss and gradient norm by those of the last steps that updated.

    A step beyond a limit is skipped on all ranks, as one with a non-finite loss is, and does not
    count among the steps that the next limits come from. The host knows them one step later at
    most, so that a fused optimizer can compare on the device (`trainer.max_skipped_steps`). They
    are saved with the run.

    Args:
        loss: how far the loss may be above; None does not watch it.
        grad_norm: how far the gradient norm before clipping may be above; None does not watch it.
        window: steps from which a limit is computed.
        min_steps: steps without a limit at the beginning; None is half of the window.
        max_skipped: steps that may be skipped; the next spike ends the training before its update.
            0 stops at the first.

    Raises:
        ValueError: arguments out of range.
    """

    loss: float | None
    grad_norm: float | None
    window: int = 128
    min_steps: int | None = None
    max_skipped: int = 10

    @staticmethod
    def validate(
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        window: int = 128,
        min_steps: int | None = None,
        max_skipped: int = 10,
    ) -> None:
        """Raise ValueError for arguments out of range."""
        wrong = [
            f"{name}={value} must be above 0; null does not watch it"
            for name, value in (("loss", loss), ("grad_norm", grad_norm))
            if value is not None and not value > 0
        ]
        if window < 2:
            wrong.append(f"window={window} must be at least 2 steps")
        elif min_steps is not None and not 2 <= min_steps <= window:
            wrong.append(f"min_steps={min_steps} must be 2 to {window}, the window")
        if max_skipped < 0:
            wrong.append(f"max_skipped={max_skipped} must not be negative; 0 stops at a spike")
        refuse(wrong)

    def __post_init__(self) -> None:
        self.validate(**{field.name: getattr(self, field.name) for field in fields(self)})
        self.skipped = 0
        self._history = {name: deque[float](maxlen=self.window) for name in _WATCHED}

    @abstractmethod
    def limit(self, values: Sequence[float], factor: float) -> float:
        """Return the largest value that is no spike after these.

        Args:
            values: of the last steps.
            factor: how far it may be above.
        """

    def limits(self) -> tuple[float, float]:
        """Return the largest loss and gradient norm of the next step; infinity is no limit."""
        loss, grad_norm = (self._limit(name) for name in _WATCHED)
        return loss, grad_norm

    def may_skip(self) -> bool:
        """Return whether the next spike would be skipped."""
        return self.skipped < self.max_skipped

    def skip(self, step: int, values: Mapping[str, float], had: str) -> None:
        """Count a spike.

        Args:
            step: optimizer step.
            values: its `loss` and `grad_norm`.
            had: which rows it was of.

        Raises:
            FloatingPointError: `max_skipped` steps have been skipped before.
        """
        limits = dict(zip(_WATCHED, self.limits(), strict=True))
        found = " and ".join(
            f"{name} {values[name]:.6g} above its limit {limits[name]:.6g}"
            for name in _WATCHED
            if values[name] > limits[name]
        )
        message = f"step {step} is a spike: {found} {had}"
        if not self.may_skip():
            raise FloatingPointError(
                f"{message}; nothing was updated. spike_policy.max_skipped={self.skipped + 1} "
                f"would skip it"
            )
        self.skipped += 1
        log.warning("%s; skipped %d of %d", message, self.skipped, self.max_skipped)

    def observe(self, values: Mapping[str, float]) -> None:
        """Note a step that was updated.

        Args:
            values: its `loss` and `grad_norm`.
        """
        for name, history in self._history.items():
            history.append(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps, and the last values."""
        return {"skipped": self.skipped, **{name: [*h] for name, h in self._history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict: as `state_dict` returned it; of another window, its newest values count.
        """
        self.skipped = state_dict["skipped"]
        for name, history in self._history.items():
            history.clear()
            history.extend(state_dict[name])

    def _limit(self, name: str) -> float:
        factor, history = getattr(self, name), self._history[name]
        least = self.window // 2 if self.min_steps is None else self.min_steps
        if factor is None or len(history) < least:
            return math.inf
        return self.limit(history, factor)


@dataclass(kw_only=True, eq=False)
class MedianMultiple(RunningLimit):
    """Limit loss and gradient norm to a multiple of their running median: factor x median.

    For values that are not negative. The arguments are those of `RunningLimit`; `loss` and
    `grad_norm` are the factors.
    """

    loss: float | None = 3.0
    grad_norm: float | None = 10.0

    def limit(self, values: Sequence[float], factor: float) -> float:
        """Return factor x median.

        Args:
            values: of the last steps.
            factor: the multiple.
        """
        return factor * median(values)


@dataclass(kw_only=True, eq=False)
class RobustZScore(RunningLimit):
    """Limit loss and gradient norm to z robust standard deviations above their running median.

    The deviation is 1.4826 x the median distance from the median, which is that of normally
    distributed values (Iglewicz & Hoaglin 1993); outliers do not move it. OLMo skips steps at six
    standard deviations of the last 128 (its `SkipStepOptimizer`, with means). The arguments are
    those of `RunningLimit`; `loss` and `grad_norm` are z.
    """

    loss: float | None = 6.0
    grad_norm: float | None = 6.0

    def limit(self, values: Sequence[float], factor: float) -> float:
        """Return median + factor x 1.4826 x median distance from the median.

        Args:
            values: of the last steps.
            factor: z.
        """
        middle = median(values)
        spread = 1.4826 * median(abs(value - middle) for value in values)
        return middle + factor * spread if spread else math.inf  # more than half are equal
