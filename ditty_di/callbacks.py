"""Where user code may act while the trainer trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditty_di.protocols import Stateful
    from ditty_di.trainer import Trainer

log = logging.getLogger(__name__)

MOMENTS = ("train_start", "step_end", "validation_end", "checkpoint_saved", "train_end")


class Callback:
    """Does nothing; subclasses override what they need.

    The trainer calls its callbacks in the order in which they were given, on all ranks at the same
    points, so they may communicate. One that also has `state_dict` and `load_state_dict` is saved
    and resumed with the run.
    """

    def train_start(self, trainer: Trainer) -> None:
        """Once, when the model has its values and before a checkpoint is loaded."""

    def step_end(self, trainer: Trainer) -> None:
        """After each step, before validation and saving; `trainer.step` is its number."""

    def validation_end(self, trainer: Trainer) -> None:
        """After each validation; `trainer.objective` is its loss."""

    def checkpoint_saved(self, trainer: Trainer) -> None:
        """After a checkpoint was started (asynchronous saves go on in the background)."""

    def train_end(self, trainer: Trainer) -> None:
        """Once, after the last step, also of a run that was asked to stop."""


class Callbacks:
    """A trainer's callbacks by name, in their order; None stands for none.

    Raises:
        TypeError: one that lacks a moment's method.
    """

    def __init__(self, named: Mapping[str, Callback | None]) -> None:
        self.named = {name: callback for name, callback in named.items() if callback is not None}
        for name, callback in self.named.items():
            if lacking := [m for m in MOMENTS if not callable(getattr(callback, m, None))]:
                raise TypeError(
                    f"callbacks.{name}: {callback!r} has no {', '.join(lacking)}; let it inherit "
                    f"from ditty_di.callbacks.Callback, whose methods do nothing"
                )

    def call(self, moment: str, trainer: Trainer) -> None:
        for callback in self.named.values():
            getattr(callback, moment)(trainer)

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds of them, as `callback_<name>`."""
        found: dict[str, Any] = {}
        for name, callback in self.named.items():
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
                found[f"callback_{name}"] = callback
        return found


class EarlyStopping(Callback):
    """Ends the training when the validation loss has not become lower for a while.

    The run counts as finished. Started again with more `patience`, it goes on.

    Args:
        patience: how many validations in a row may be without an improvement.
        min_delta: what is lower by no more than this is none.

    Raises:
        ValueError: `patience` below 1, or a trainer without a validator.
    """

    def __init__(self, patience: int = 3, *, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"EarlyStopping: patience={patience} must be at least 1, and min_delta={min_delta} "
                f"not negative"
            )
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_step, self.since = math.inf, 0, 0
        self._trainer: Trainer | None = None

    def train_start(self, trainer: Trainer) -> None:
        if trainer.validator is None:
            raise ValueError("EarlyStopping: it needs a validator to tell whether training helps")
        self._trainer = trainer

    def validation_end(self, trainer: Trainer) -> None:
        self._trainer = trainer
        loss = math.nan if trainer.objective is None else trainer.objective
        if loss < self.best - self.min_delta:
            self.best, self.best_step, self.since = loss, trainer.step, 0
        else:
            self.since += 1  # also when it is no number
        self._judge()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "since": self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.since = state_dict["since"]
        self._judge()

    def _judge(self) -> None:
        if self.since >= self.patience and self._trainer is not None:
            self._trainer.stop(
                f"no validation loss below {self.best:.6g}, of step {self.best_step}, in "
                f"{self.since} validations"
            )
