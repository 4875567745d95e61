"""Ends a training that no longer helps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ditty_di.callbacks.base import Callback

if TYPE_CHECKING:
    from ditty_di.protocols import Training


class EarlyStopping(Callback):
    """Ends the training when the validation loss has not become lower for a while.

    The run counts as finished. Started again with more `patience`, it goes on.

    Args:
        patience: how many validations in a row may be without an improvement.
        min_delta: what is lower by no more than this is none.

    Raises:
        ValueError: `patience` below 1, or a trainer without a validator.
    """

    @staticmethod
    def validate(*, patience: int = 1, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"EarlyStopping: patience={patience} must be at least 1, and min_delta={min_delta} "
                f"not negative"
            )

    def __init__(self, patience: int = 3, *, min_delta: float = 0.0) -> None:
        self.validate(patience=patience, min_delta=min_delta)
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_step, self.since = math.inf, 0, 0
        self._trainer: Training | None = None

    def train_start(self, trainer: Training) -> None:
        if trainer.validator is None:
            raise ValueError("EarlyStopping: it needs a validator to tell whether training helps")
        self._trainer = trainer

    def validation_end(self, trainer: Training) -> None:
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
