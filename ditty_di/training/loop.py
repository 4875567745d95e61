"""The training loop: steps, validation, checkpoints and callbacks in their order."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.tools.utils import GarbageCollection

from ditty_di import protocols
from ditty_di.batch import Batch
from ditty_di.callbacks import Callbacks
from ditty_di.checkpoint import CheckpointError
from ditty_di.models.evaluation import evaluating
from ditty_di.optim.container import Schedulers
from ditty_di.precision.casting import release_copies
from ditty_di.training import checks
from ditty_di.training.accumulation import GradientAccumulation
from ditty_di.training.non_finite import NonFiniteGuard, StepValues
from ditty_di.training.rescue import StepBoundary
from ditty_di.training.saving import Saving
from ditty_di.training.sources import BY_SOURCE, SourceMetrics
from ditty_di.training.titan import TitanTrainer

log = logging.getLogger(__name__)


class TrainingLoop(TitanTrainer):
    """Run the components that a subclass has set up.

    Attributes:
        objective: the last validation loss, without a validator the last training loss.
        objective_step: the step of the objective.
        stopped: why `stop` was called; None if it was not.
    """

    model_parts: list[nn.Module]
    lr_schedulers: Schedulers
    accumulation: GradientAccumulation
    guard: NonFiniteGuard
    sources: SourceMetrics
    boundary: StepBoundary
    saving: Saving
    validator: protocols.Validator | None
    callbacks: Callbacks
    profiler: protocols.ProfilerFactory | None
    gc_interval: int
    objective: float | None = None
    objective_step: int | None = None
    stopped: str | None = None
    _stop_status = "finished"
    _validated: Mapping[str, float] = MappingProxyType({})
    _around_model: tuple[Any, ...]  # loss and processors
    _updated = False  # in this process
    _max_steps_before: int | None = None  # of the run that is resumed

    def train(self, *, restored: Callable[[], None] | None = None) -> dict[str, Any]:
        """Train from the newest checkpoint, or from the start, to `max_steps`.

        An exception of a step, a callback or the validator is raised after the last complete step
        has been saved, if all ranks can agree on it.

        Args:
            restored: called on every rank once the checkpoint is loaded, or there is none.

        Returns:
            status (`finished`, `preempted`, or what `stop` was given), step, objective (the last
            validation loss, else the last training loss), objective_step, skipped_steps, stopped
            (why `stop` was called, else None), rejected_batches with processors, the values of the
            last validation as `validation/NAME`, and the metrics' summary.
        """
        self.runtime.catch_signals()
        gc_was_enabled = gc.isenabled()
        # Disables automatic collection.
        self.gc_handler = GarbageCollection(gc_freq=self.gc_interval)
        try:
            self.callbacks.call("on_train_start", self)
            if self.runtime.rank == 0:
                self.sources.say()
            self._restore()
            if restored is not None:
                restored()
            if self.should_continue_training():  # fail now rather than after the first steps
                checks.try_first_validation(self.validator, self._around_model)
                self.saving.require_space()
            self.metrics_processor.start(
                model_parts=self.model_parts,
                max_steps=self.config.training.steps,
                runtime=self.runtime,
                step=self.step,
            )
            profiling = self.profiler(global_step=self.step) if self.profiler else nullcontext()
            with profiling as profiler:
                exhausted = self._run_rescued(profiler)
            if self.stopped or exhausted:
                log.warning("ended after step %d: %s", self.step, self.stopped or "no more data")
            self._save(force=True)
            self.saving.wait_for_staging()  # a callback may change the weights
            self.callbacks.call("on_train_end", self)
        except BaseException as error:
            if not hasattr(error, "training_step"):  # for `ditty_di.launch.failure`
                error.training_step = self.step  # type: ignore[attr-defined]
            self.metrics_processor.close()  # keep what was logged until then
            raise
        finally:
            for part in self.model_parts:
                release_copies(part)  # the injected model gets its own parameters back
            if gc_was_enabled:
                gc.enable()
            self.runtime.release_signals()
        finished = exhausted or not self.should_continue_training()
        # Whoever was stopped at the last step has finished.
        status = self._stop_status if super().should_continue_training() else "finished"
        if not finished and self.step and not self.objective_step and self.last_loss is not None:
            # Stopped before it validated what it learned: report its training loss.
            self.objective, self.objective_step = self.last_loss, self.step
        return {
            "status": status if finished else "preempted",
            "step": self.step,
            "objective": self.objective,
            "objective_step": self.objective_step,
            "skipped_steps": self.guard.skipped,
            **({"skipped_spikes": spikes.skipped} if (spikes := self.guard.spikes) else {}),
            "stopped": self.stopped,
            **self.accumulation.get_metrics(),
            **self._validated,
            **self.metrics_processor.summary(),
        }

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Do one optimizer step on the next micro-batches, on all ranks or on none.

        Args:
            data_iterator: this rank's batches, as `batch_generator` yields them.
        """
        micro_batches, num_valid_global = self.accumulation.next_micro_batches(data_iterator)
        learning_rates = self.lr_schedulers.get_metrics()
        loss_metrics = self.optimizer_step.metrics
        loss_metrics.clear()
        values: StepValues | None = None
        if micro_batches:  # preprocessors may have rejected all of them
            values = self.optimizer_step(micro_batches, num_valid_global)
            self.guard.done(values, num_valid_global)
        else:
            self.guard.read()
        self.boundary.updating("the learning rate")
        self.lr_schedulers.step()
        self.boundary.complete()
        self.sources.add(loss_metrics.take(BY_SOURCE), self.accumulation.num_valid_of_sources)
        if self.metrics_processor.should_log(self.step):
            self.guard.read()
            # Where a loss's own metric has the name of one of these, these win.
            data: dict[str, float] = getattr(self.dataloader, "get_metrics", dict)()
            own = loss_metrics.metrics() | self.accumulation.get_metrics() | data
            own |= self.sources.report() | self.guard.get_metrics() | self.callbacks.get_metrics()
            (tokens,) = self.runtime.sum([self.ntokens_seen])
            logged = own | learning_rates | dict(values or {}) | {"tokens_seen": tokens}
            self.metrics_processor.log(self.step, logged)

    @property
    def last_loss(self) -> float | None:
        """The loss of the last step; None before the first."""
        self.guard.read()
        return self.guard.last_loss

    def stop(self, reason: str, status: str = "finished") -> None:
        """End the training after this step, as if it had been the last.

        Args:
            reason: logged, and returned by `train`. All ranks must call this at the same step
                (`runtime.any` returns whether any rank wants to).
            status: returned by `train`; with another one than "finished" nothing is exported.
        """
        self.stopped, self._stop_status = reason, status

    def should_continue_training(self) -> bool:
        """Return whether steps are left and `stop` was not called."""
        return self.stopped is None and super().should_continue_training()

    def close(self) -> None:
        """Wait for the checkpoint being written, and close the loggers."""
        super().close()
        self.saving.close()

    def _run_rescued(self, profiler: Any) -> bool:
        """Run the steps; save the last complete one after an exception."""
        try:
            exhausted = self._run_steps(profiler)
            self.guard.read()
            self.accumulation.raise_failure()
        except CheckpointError:
            raise  # saving is what failed
        except Exception as error:
            self.guard.read()
            if (cause := self.saving.after(error)) is error:
                raise
            raise cause from None
        return exhausted

    def _run_steps(self, profiler: Any) -> bool:
        """Run steps until the end or a stop request; return whether the data ended first."""
        data = self.batch_generator(self.dataloader)
        first = self.step + 1
        if self.step == 0:
            self._validate(last=False)
        elif self.validator and self.objective_step != self.step == self.config.training.steps:
            self._validate(last=True)  # the run failed in this validation
        while self.should_continue_training() and not self.accumulation.stopping:
            self.saving.mark()
            self.step += 1
            self.gc_handler.run(self.step)
            try:
                self.train_step(data)
            except DataloaderExhaustedError:
                self.step -= 1
                self.boundary.complete()
                if self.step == 0:
                    raise ValueError("dataloader: it yields no batch on some rank") from None
                self._validate(last=True)
                return True
            self._call("on_step_end")
            self._validate(last=not self.should_continue_training())
            self._save(force=self.accumulation.saving)
            if profiler:
                profiler.step()
            if self.step == first:
                # Lazy initialization and compilation are over: a slower collective now hangs.
                timeout = timedelta(seconds=self.runtime.train_timeout)
                dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
                if self.should_continue_training():
                    self.saving.require_space()  # the optimizer has its state now
        return False

    def _before_update(self) -> None:
        if not self._updated:
            self._updated = True
            checks.warn_without_gradient(self.model_parts)
        self.saving.wait_for_staging()
        self.boundary.updating("the parameters")

    def _note(self, step: int, loss: float) -> None:
        if self.validator is None and self.objective_step == step:
            self.objective = loss  # it was not known at the end of the step

    def _call(self, moment: str) -> None:
        """Call the callbacks.

        A rank that fails there tells the others with the next step's reduction: they may not be in
        a collective now.
        """
        try:
            self.callbacks.call(moment, self)
        except Exception as error:
            if self.runtime.world_size > 1:
                log.error("%s, step %d: %s: %s", moment, self.step, type(error).__name__, error)
            error.training_step = self.step  # type: ignore[attr-defined]
            self.accumulation.fail(error)

    def _validate(self, *, last: bool) -> None:
        """Validate when it is due; a stop request during validation ends the training too."""
        if self.validator is None:
            self.objective, self.objective_step = self.guard.last_loss, self.step
        elif not self.accumulation.stopping and (last or self.validator.should_validate(self.step)):
            self.guard.read()
            with self.metrics_processor.pause(), evaluating(self._around_model):
                values = self.validator.validate(self.step)
            if not values:
                self.accumulation.stop()
                return
            self.objective, self.objective_step = values["loss"], self.step
            self._validated = {f"validation/{name}": value for name, value in values.items()}
            self.metrics_processor.log(self.step, self._validated)
            with self.metrics_processor.pause():
                self._call("on_validation_end")

    def _restore(self) -> None:
        max_steps, self._max_steps_before = self.config.training.steps, None
        if not self.saving.load():
            return
        if self.step > max_steps:
            log.warning(
                "the checkpoint is at step %d, and max_steps=%d: nothing to do",
                self.step,
                max_steps,
            )
            return
        log.info("resumed after step %d of %d", self.step, max_steps)
        if self._max_steps_before not in (None, max_steps):
            log.info(
                "the run had max_steps=%s before; its learning rate continues at %.3g",
                self._max_steps_before,
                self.lr_schedulers.get_metrics()["lr"],
            )

    def _save(self, *, force: bool = False) -> None:
        with self.metrics_processor.pause():
            if self.saving.save(force=force):
                self._call("on_save")
