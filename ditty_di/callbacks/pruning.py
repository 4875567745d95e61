"""Stop the runs of a sweep that are worse than others after as many steps."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

from ditty_di.callbacks.base import Callback
from ditty_di.data.options import at_least
from ditty_di.io import read_json, write_json
from ditty_di.launch.rundir import RunDirectory
from ditty_di.protocols import Training
from ditty_di.sweeps.study import this_trial

log = logging.getLogger(__name__)


class _Pruning(Callback):
    """Ask after each validation, on rank 0, whether the run goes on; else it ends as `pruned`."""

    _ask = False

    def _start(self, trainer: Training, *, applies: bool, without: str) -> None:
        """Begin to ask.

        Args:
            trainer: the trainer; it must validate.
            applies: whether there is something to compare with; used on rank 0.
            without: logged where there is not.

        Raises:
            ValueError: the trainer has no validator.
        """
        name = type(self).__name__
        if trainer.validator is None:
            raise ValueError(f"{name}: it needs a validator, whose loss it compares")
        self._ask = trainer.runtime.broadcast(applies)
        if not self._ask and trainer.runtime.rank == 0:
            log.info("%s: %s; nothing is pruned", name, without)

    def on_validation_end(self, trainer: Training) -> None:
        """Compare the loss, and end the training if it is not among the better ones.

        Args:
            trainer: the trainer.
        """
        if not self._ask or trainer.step == 0 or not self._due(trainer.step):
            return
        reason: str | None = None
        if trainer.runtime.rank == 0:
            loss = math.nan if trainer.objective is None else trainer.objective
            try:
                reason = self._reason(trainer.step, loss)
            except Exception as error:  # of the file system or database that the jobs share
                log.warning(
                    "%s: step %d is not compared: %s", type(self).__name__, trainer.step, error
                )
        if (reason := trainer.runtime.broadcast(reason)) is not None:
            trainer.stop(f"pruned: {reason}", status="pruned")

    def _due(self, step: int) -> bool:
        """Return whether to compare at this step; called on every rank."""
        return True

    @abstractmethod
    def _reason(self, step: int, loss: float) -> str | None:
        """Return why the run ends here, None if it goes on; called on rank 0."""


class ASHA(_Pruning):
    """Asynchronous successive halving among the jobs of a sweep, of any sweeper and launcher.

    At `first_rung`, `eta` times as many steps, `eta` squared times and so on, a run goes on only if
    its validation loss is among the best 1/`eta` of the runs that have come so far, and the first
    ones always do, so no run waits (Li et al. 2020, arXiv:1810.05934, in its variant that stops
    runs). The first validation at or after a rung counts for it.

    The losses are files in the folder of the sweep, `rungs/STEPS/JOB.json`, each written by one
    job. A run that is not a job of a sweep is left alone.

    Args:
        run: folder of the run.
        eta: one of so many runs goes on.
        first_rung: number of optimizer steps before the first comparison; None is the step of the
            first validation.

    Raises:
        ValueError: `eta` below 2, `first_rung` below 1, or a trainer without a validator.
    """

    @staticmethod
    def validate(*, eta: int = 2, first_rung: int | None = None) -> None:
        """Raise ValueError for arguments out of range."""
        at_least(2, eta=eta)
        at_least(1, first_rung=first_rung)

    def __init__(self, run: str, *, eta: int = 3, first_rung: int | None = None) -> None:
        self.validate(eta=eta, first_rung=first_rung)
        self.directory, self.eta, self.first_rung = RunDirectory(run), eta, first_rung
        self._sweep: Path | None = None
        self._rung = 0  # number of steps of the last one

    def on_train_start(self, trainer: Training) -> None:
        """Find the sweep.

        Args:
            trainer: the trainer.
        """
        self._sweep = self.directory.sweep()
        without = "the run is not a job of a sweep (--multirun)"
        self._start(trainer, applies=self._sweep is not None, without=without)

    def _due(self, step: int) -> bool:
        rung = self.first_rung = self.first_rung or step
        while rung * self.eta <= step:
            rung *= self.eta
        before, self._rung = self._rung, rung if rung <= step else 0
        return self._rung > before

    def _reason(self, step: int, loss: float) -> str | None:
        assert self._sweep is not None
        folder = self._sweep / "rungs" / f"{self._rung:08}"
        folder.mkdir(parents=True, exist_ok=True)
        job = self.directory.path.relative_to(self._sweep.absolute()).as_posix()
        write_json(
            folder / f"{job.replace('/', '+')}.json", {"job": job, "step": step, "loss": loss}
        )
        found = [entry["loss"] for file in folder.glob("*.json") if (entry := read_json(file))]
        losses = sorted(math.inf if value is None else value for value in found)
        best = losses[: max(len(losses) // self.eta, 1)]
        if loss <= best[-1]:  # never if it is NaN
            return None
        among = f"among the best {len(best)} of {len(losses)} runs after {self._rung} steps"
        return f"validation loss {loss:.6g} is not {among} ({best[-1]:.6g})"

    def state_dict(self) -> dict[str, Any]:
        """Return the first rung, and the last one that was passed."""
        return {"first_rung": self.first_rung, "rung": self._rung}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, so that no rung is passed twice.

        Args:
            state_dict: as `state_dict` returned it.
        """
        self.first_rung, self._rung = state_dict["first_rung"], state_dict["rung"]


class Pruning(_Pruning):
    """Report each validation loss to the Optuna study, and stop when its pruner gives the trial up.

    A run that is not an unfinished trial of a study (`hydra/sweeper=optuna`) is left alone.

    Args:
        run: folder of the run.
        pruner: an `optuna.pruners.BasePruner`; None is Optuna's default, the median of the trials
            so far.
    """

    def __init__(self, run: str, *, pruner: Any = None) -> None:
        self.directory, self.pruner = RunDirectory(run), pruner
        self._trial: Any = None

    def on_train_start(self, trainer: Training) -> None:
        """Find the trial in the study.

        Args:
            trainer: the trainer.
        """
        if trainer.runtime.rank == 0:
            self._trial = this_trial(self.directory, self.pruner)
        without = "the run is not an unfinished trial of hydra/sweeper=optuna"
        self._start(trainer, applies=self._trial is not None, without=without)

    def _reason(self, step: int, loss: float) -> str | None:
        self._trial.report(loss, step)
        if not self._trial.should_prune():
            return None
        pruner = type(self._trial.study.pruner).__name__
        return f"{pruner} gives up validation loss {loss:.6g} at step {step}"
