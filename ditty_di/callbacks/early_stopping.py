"""Stop a training whose validation loss has stopped improving."""

from __future__ import annotations

import math
from typing import Any

from ditty_di.callbacks.base import Callback
from ditty_di.protocols import Training


class EarlyStopping(Callback):
    """Stop the training when the validation loss has not improved for a number of validations.

    The run counts as finished. Started again with more `patience`, it goes on.

    Args:
        patience: number of validations in a row without an improvement.
        min_delta: smallest decrease of the loss that counts as an improvement.

    Raises:
        ValueError: `patience` below 1, or a trainer without a validator.
    """

    @staticmethod
    def validate(*, patience: int = 1, min_delta: float = 0.0) -> None:
        """Check the arguments; see the class.

        Args:
            patience: number of validations.
            min_delta: smallest improvement.
        """
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

    def on_train_start(self, trainer: Training) -> None:
        """Keep the trainer, which must validate.

        Args:
            trainer: the trainer.
        """
        if trainer.validator is None:
            raise ValueError("EarlyStopping: it needs a validator, whose loss it watches")
        self._trainer = trainer

    def on_validation_end(self, trainer: Training) -> None:
        """Compare the loss with the best one so far.

        Args:
            trainer: the trainer.
        """
        self._trainer = trainer
        loss = math.nan if trainer.objective is None else trainer.objective
        if loss < self.best - self.min_delta:
            self.best, self.best_step, self.since = loss, trainer.step, 0
        else:  # also when it is NaN
            self.since += 1
        self._stop_if_due()

    def state_dict(self) -> dict[str, Any]:
        """Return the best loss, its step, and the number of validations since."""
        return {"best": self.best, "best_step": self.best_step, "since": self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; stop again if the patience is still exhausted.

        Args:
            state_dict: as `state_dict` returned it.
        """
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.since = state_dict["since"]
        self._stop_if_due()

    def _stop_if_due(self) -> None:
        if self.since >= self.patience and self._trainer is not None:
            self._trainer.stop(
                f"no validation loss below {self.best:.6g}, of step {self.best_step}, in "
                f"{self.since} validations"
            )
