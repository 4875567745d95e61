"""Save and load a training: at intervals, at its end, and after an exception."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from ditty_di.protocols import Checkpointer, Position
from ditty_di.runtime import Runtime
from ditty_di.training.non_finite import non_finite_parameters, require_finite_parameters
from ditty_di.training.rescue import Rescue, StepBoundary


class Saving:
    """The checkpoints of a training; without a checkpointer its methods do nothing.

    Args:
        checkpointer: the trainer's, or None.
        boundary: undoes a failed step, so that the last complete one can be saved.
        position: the trainer.
        trained: modules whose parameters must be finite to be saved.
        runtime: the ranks, which save together.

    Attributes:
        saved_step: step of the newest checkpoint; 0 without one.
    """

    def __init__(
        self,
        checkpointer: Checkpointer | None,
        *,
        boundary: StepBoundary,
        position: Position,
        trained: Sequence[Any],
        runtime: Runtime,
    ) -> None:
        self.checkpointer, self.boundary, self.runtime = checkpointer, boundary, runtime
        self.saved_step = 0
        self._saved_at = time.monotonic()
        self._position, self._trained = position, trained
        self._rescue = Rescue(
            boundary,
            progress=self,
            save=self._save_at_failure if checkpointer else None,
            unfit=partial(non_finite_parameters, trained),
            rank=runtime.rank,
        )

    @property
    def step(self) -> int:
        """The trainer's current optimizer step."""
        return self._position.step

    def load(self) -> bool:
        """Load the newest checkpoint; return whether there is one."""
        if self.checkpointer is None or self.checkpointer.load() is None:
            return False
        self.saved_step = self.step
        self._saved_at = time.monotonic()
        return True

    def is_overdue(self) -> bool:
        """Return whether `save_every_minutes` have passed since the last save, on rank 0 alone."""
        minutes = getattr(self.checkpointer, "save_every_minutes", None)
        if minutes is None or self.runtime.rank != 0:
            return False
        return time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, *, force: bool = False) -> bool:
        """Save the current step if it is due; return whether it was saved.

        Args:
            force: save at any step that is not saved yet.

        Raises:
            FloatingPointError: a parameter is not finite, on any rank.
        """
        if self.checkpointer is None:
            return False
        objective = self._validated
        if not force and (is_due := getattr(self.checkpointer, "is_due", None)) is not None:
            if not is_due(self.step, objective):
                return False
            force = True
        # Another one decides by itself, as a rule by its `save_interval`.
        due = force or not self.step % (getattr(self.checkpointer, "save_interval", None) or 1)
        if due and self.step > self.saved_step:
            require_finite_parameters(self.step, self._trained, self.runtime)
        started = time.monotonic()
        if not self.checkpointer.save(self.step, force=force, objective=objective):
            return False
        self.saved_step, self._saved_at = self.step, started
        return True

    @property
    def _validated(self) -> float | None:
        """The loss of a validation after this very step; None without one."""
        position = self._position
        validated = position.validator is not None and position.objective_step == position.step
        return position.objective if validated else None

    def mark(self) -> None:
        """Record the state before a step, to which `after` can go back."""
        if self.checkpointer:
            self.boundary.mark()

    def wait_for_staging(self) -> None:
        """Wait until the values of a checkpoint are copied and may change."""
        if self.checkpointer:
            self.checkpointer.maybe_wait_for_staging()

    def require_space(self) -> None:
        """Raise CheckpointError if there is no disk space for a checkpoint."""
        if require := getattr(self.checkpointer, "require_space", None):
            require()

    def after(self, error: Exception) -> Exception:
        """Save the last complete step after an exception; return the exception to raise.

        Args:
            error: the exception.
        """
        return self._rescue.after(error)

    def close(self) -> None:
        """Destroy the process group of `after`."""
        self._rescue.close()

    def _save_at_failure(self, group: Any) -> None:
        checkpointer: Any = self.checkpointer
        if group is not None and hasattr(checkpointer, "use_group"):
            checkpointer.use_group(group)
        if checkpointer.save(self.step, force=True, objective=self._validated):
            self.saved_step = self.step
        checkpointer.close()
