"""The trainer: torchtitan's, with all components injected."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.tools.utils import GarbageCollection

from ditty_di import protocols
from ditty_di.batch import Batch
from ditty_di.callbacks import Callback, Callbacks
from ditty_di.checkpoint import CheckpointError
from ditty_di.isolation import check_rows, copy_of_each_kind, isolation_of
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.models.evaluation import evaluating
from ditty_di.optim.container import Optimizers, Schedulers
from ditty_di.parallelize.fits import Parts, require_fit
from ditty_di.parallelize.pipeline import SyncedPPRNG
from ditty_di.precision.casting import release_copies
from ditty_di.processors import PostProcessor, PreProcessor, Processors
from ditty_di.runtime import Runtime
from ditty_di.training import checks, setup
from ditty_di.training.accumulation import GradientAccumulation
from ditty_di.training.gradients import LossParameters
from ditty_di.training.non_finite import NonFiniteGuard, StepValues
from ditty_di.training.rescue import StepBoundary
from ditty_di.training.saving import Saving
from ditty_di.training.sources import BY_SOURCE, LossBySource, SourceMetrics
from ditty_di.training.step import TrainStep
from ditty_di.training.titan import TitanTrainer

log = logging.getLogger(__name__)


class Trainer(TitanTrainer):
    """Train an injected model with injected components.

    An optimizer step accumulates the gradients of `gradient_accumulation_steps` micro-batches on
    every data-parallel rank. What the loss counts in them (`loss_fn.num_valid`) is summed over all
    of them before the first backward pass, so that any split of the same rows gives the same
    gradients.

    Args:
        model: any `nn.Module`, on meta (then `weights` fills it) or with its values.
        loss_fn: see `ditty_di.protocols.Loss`. Any other callable of output and labels is taken as
            a mean over rows (`ditty_di.losses.PlainLoss`).
        optimizer: called with the named trainable parameters.
        dataloader: a loader, or a factory that takes this rank's coordinates.
        max_steps: optimizer steps in total, including those of a resumed run before it stopped.
        lr_scheduler: called with the optimizer; None keeps the learning rate constant.
        runtime: device, ranks and seeds; None is `Runtime()`.
        weights: fills a model on meta; None is the model's attribute `default_weights`.
        convert: replaces layers of the model, such as linear layers by float8 ones
            (`ditty_di.precision`), before the loss prepares it and it is parallelized.
        parallelize_fn: shards, wraps or compiles the model.
        pipeline_fn: splits the model into pipeline stages.
        validator: computes the loss on held-out data.
        checkpointer: saves and loads.
        logger: collects metrics and passes them to loggers.
        grad_scaler: `torch.amp.GradScaler` for float16, or a partial of it that lacks `device`;
            its overflows do not count as skipped steps.
        profiler: a partial of `torchtitan.tools.profiler.Profiler`, started with the first step.
        preprocessors: run on a batch before the model (`ditty_di.processors`).
        postprocessors: run on the model's output before the loss.
        model_contract: inputs and outputs of the model; None is its attribute `contract`, if any.
        contracts: `static` checks the contracts from loader to loss before anything is built;
            `runtime` also compares them with the tensors of the first batch, and `every_batch` with
            those of all batches.
        parallelize_loss_fn: shards the parameters of a loss; None keeps them whole on every rank.
        callbacks: by name, called in order (`ditty_di.callbacks`).
        global_batch_size: rows per optimizer step over all ranks; None is one micro-batch per rank.
        max_grad_norm: largest global L2 norm of the gradients; `inf` only computes it.
        max_skipped_steps: optimizer steps that may be skipped, on all ranks, for non-finite loss or
            gradients or for lack of a valid label, before training fails.
        spike_policy: skips steps whose loss or gradient norm is far above those before it
            (`ditty_di.training.spikes`).
        gc_interval: optimizer steps between collections of Python's garbage, the same on all ranks.

    Raises:
        ValueError: a component does not fit the others; the message names the slot.
        TypeError: an unknown argument, or an object of the wrong kind in a slot.
    """

    validate = staticmethod(checks.validate)
    rehearse = staticmethod(checks.rehearse)

    @checks.known_arguments
    def __init__(
        self,
        *,
        model: nn.Module,
        loss_fn: protocols.Loss | protocols.LossFunction,
        optimizer: protocols.OptimizerFactory,
        dataloader: protocols.DataLoaderFactory | protocols.DataLoader,
        max_steps: int,
        lr_scheduler: protocols.SchedulerFactory | None = None,
        runtime: Runtime | None = None,
        weights: protocols.WeightsFn | None = None,
        convert: protocols.ModelTransform | None = None,
        parallelize_fn: protocols.ParallelizeFn | None = None,
        pipeline_fn: protocols.PipelineFn | None = None,
        validator: protocols.ValidatorFactory | None = None,
        checkpointer: protocols.CheckpointerFactory | None = None,
        logger: protocols.MetricsProcessor | None = None,
        grad_scaler: torch.amp.GradScaler | protocols.GradScalerFactory | None = None,
        profiler: protocols.ProfilerFactory | None = None,
        preprocessors: Sequence[PreProcessor] = (),
        postprocessors: Sequence[PostProcessor] = (),
        model_contract: str | None = None,
        contracts: Literal["static", "runtime", "every_batch"] = "static",
        parallelize_loss_fn: protocols.ParallelizeFn | None = None,
        callbacks: Mapping[str, Callback | None] | None = None,
        global_batch_size: int | None = None,
        max_grad_norm: float = 1.0,
        max_skipped_steps: int = 0,
        spike_policy: protocols.SpikePolicy | None = None,
        gc_interval: int = 1000,
    ) -> None:
        if max_steps is None:
            raise ValueError(
                "trainer.max_steps=None: give the number of optimizer steps, as max_steps=1000; "
                "ditty_di.data.training_steps computes it from epochs"
            )
        self.validate(
            max_steps=max_steps,
            max_grad_norm=max_grad_norm,
            global_batch_size=global_batch_size,
            max_skipped_steps=max_skipped_steps,
            gc_interval=gc_interval,
        )
        if grad_scaler and runtime and runtime.parallel_dims.pp_enabled:
            raise ValueError("grad_scaler: a pipeline does not scale its loss; use precision=bf16")
        self.runtime = runtime = runtime or Runtime()
        self.device, self.parallel_dims = runtime.device, runtime.parallel_dims
        # What inherited methods read of torchtitan's configuration.
        self.config = SimpleNamespace(
            training=SimpleNamespace(steps=max_steps, disable_cuda_graphs=True)
        )
        self.gc_interval, self.profiler = gc_interval, profiler
        self.step = self.ntokens_seen = 0
        self.objective: float | None = None
        self.objective_step: int | None = None
        self.stopped: str | None = None
        self._stop_status = "finished"
        self.callbacks = Callbacks(callbacks or {})

        # -- model, loss and what runs between them
        model = setup.prepare_model(model, convert, loss_fn)
        around = {"model": model, "model_contract": model_contract, "loss": loss_fn}
        self.processors = setup.setup_processors(
            Processors(preprocessors, postprocessors),
            runtime=runtime,
            contracts=contracts,
            around={"loader": dataloader, **around},
        )
        self.loss_fn = loss_fn = setup.setup_loss(loss_fn, runtime, parallelize_loss_fn)
        self.dataloader = setup.setup_dataloader(dataloader, runtime)
        collate_fn = getattr(self.dataloader, "collate_fn", None)
        parts = Parts(model, loss_fn, parallelize_fn, pipeline_fn, collate_fn)
        require_fit(parts, runtime.parallel_dims)
        by_source = LossBySource(loss_fn, getattr(self.dataloader, "source_names", ()))
        self.model_config = getattr(model, "config", None)
        weights = setup.weights_of(model, weights)
        self.parts = setup.setup_model(
            model,
            runtime=runtime,
            weights=weights,
            parallelize_fn=parallelize_fn,
            pipeline_fn=pipeline_fn,
            processors=self.processors,
        )
        self.model_parts = self.parts.modules
        around_model = (loss_fn, *self.processors.preprocessors, *self.processors.postprocessors)
        self._around_model = around_model

        # -- optimizer
        self.loss_parameters = LossParameters(loss_fn, self.model_parts, runtime)
        self.optimizers = Optimizers(optimizer, self.model_parts, self.loss_parameters.named)
        self.optimizer = self.optimizers.optimizer
        self.lr_schedulers = Schedulers(lr_scheduler, self.optimizer)
        if callable(grad_scaler):
            grad_scaler = grad_scaler(device=self.device.type)
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(self.device.type, enabled=False)

        # -- steps
        self.gradient_accumulation_steps = setup.accumulation_steps(
            global_batch_size, dataloader=self.dataloader, runtime=runtime
        )
        if require := getattr(self.parts.schedule, "require_micro_batches", None):
            require(self.gradient_accumulation_steps)
        self.accumulation = GradientAccumulation(
            self.gradient_accumulation_steps,
            loss_fn=loss_fn,
            runtime=runtime,
            prepare=self.prepare if self.processors else None,
            count_sources=by_source.count,
            wants_save=lambda: self.saving.is_overdue(),
        )
        self.guard = NonFiniteGuard(
            max_skipped_steps,
            position=self,
            accumulation=self.accumulation,
            scaler=self.grad_scaler,
            rank=runtime.rank,
            dataloader=self.dataloader,
            spikes=spike_policy,
            on_read=self._note,
        )
        self.optimizer_step = TrainStep(
            parts=self.parts,
            loss_fn=by_source,
            optimizer=self.optimizer,
            runtime=runtime,
            scaler=self.grad_scaler,
            max_grad_norm=max_grad_norm,
            processors=self.processors,
            loss_parameters=self.loss_parameters,
            prepare_inputs=self._prepare_inputs,
            pp_size=self.gradient_accumulation_steps,
            before_update=self._before_update,
            on_skip=self.guard.skip,
            defer_read=self.guard.defer_read,
            limits=self.guard.limits if spike_policy else None,
        )
        self.sources = SourceMetrics(by_source, self.optimizer_step.metrics)
        self.synced_pp_rng = SyncedPPRNG(runtime)
        self.metrics_processor: protocols.MetricsProcessor = logger or MetricsProcessor()

        # -- checkpoints, and the last complete step when an exception ends the training
        states: dict[str, Any] = {"train_state": self, "rejected_batches": self.accumulation}
        # Saved after `train_state`, which reads the values of the last step.
        spikes = {"spike_policy": spike_policy} if spike_policy else {}
        counters = SimpleNamespace(state_dict=self._counters, load_state_dict=self.__dict__.update)
        modules = (*self.model_parts, *around_model)
        self.boundary = StepBoundary(
            dataloader=self.dataloader if checkpointer else None,
            states={**states, "train_state": counters},
            modules=[module for module in modules if isinstance(module, nn.Module)],
            device=self.device,
        )
        self.checkpointer: protocols.Checkpointer | None = None
        if checkpointer:
            setup.require_state(self.dataloader)
            self.checkpointer = setup.setup_checkpointer(
                checkpointer,
                model_parts=self.model_parts,
                weights=weights,
                loss_fn=loss_fn,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_schedulers.scheduler,
                dataloader=self.boundary.position,
                grad_scaler=self.grad_scaler,
                others={**states, **spikes, **self.callbacks.states(), **self.processors.states()},
            )
        self.saving = Saving(
            self.checkpointer,
            boundary=self.boundary,
            position=self,
            trained=(*self.model_parts, loss_fn),
            runtime=runtime,
        )

        # -- validation
        self.validator: protocols.Validator | None = None
        self._validated: dict[str, float] = {}
        if validator:
            self.validator = validator(
                model_parts=self.model_parts,
                evaluate=self.optimizer_step.evaluate,
                loss_fn=loss_fn,
                runtime=runtime,
                prepare=self.prepare,
            )
            if samples := getattr(self.validator, "samples", None):
                self.callbacks = Callbacks({**self.callbacks.named, "samples": samples})
        whole = self.parts.whole
        if whole is not None:
            self.callbacks = self.callbacks.without_forward()
        # No stage can be asked about documents.
        isolation = isolation_of(
            self.model_parts[0] if whole is None else copy_of_each_kind(whole),
            config=self.model_config,
            forward=self.forward if whole is None else None,
            processors=self.processors,
            runtime=runtime,
        )
        for loader in (self.dataloader, getattr(self.validator, "dataloader", None)):
            check_rows(loader, isolation=isolation, runtime=runtime)

    # ------------------------------------------------------------------------------- training
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

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Return the model's output for one micro-batch of inputs.

        Args:
            inputs: the model's arguments on any device; `"input"` is the positional one.
        """
        return self.optimizer_step.run_model(inputs)

    def prepare(self, batch: Batch) -> Batch | None:
        """Run the preprocessors on a batch of the loader; return None if one rejects it.

        Args:
            batch: the loader's batch.
        """
        pp = self.parallel_dims.pp_enabled
        with self.synced_pp_rng(self.step) if pp else nullcontext():
            return self.processors.prepare(
                batch,
                epoch=getattr(self.dataloader, "epoch", 0),
                step=self.step,
                total_steps=self.config.training.steps,
                device=self.device,
                model=self.model_parts[0],
            )

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

    # ---------------------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Return the counters that a checkpoint saves."""
        self.guard.read()
        return {
            "step": self.step,
            "tokens_seen": self.ntokens_seen * self.runtime.dp_world_size,
            "skipped_steps": self.guard.skipped,
            "objective": self.objective,
            "objective_step": self.objective_step,
            "max_steps": self.config.training.steps,
            **({"source_tokens": self.sources.state_dict()} if self.sources.names else {}),
        }

    def _counters(self) -> dict[str, int]:
        """Return what a step changes before its update, to undo it; a subclass adds its own."""
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step, self.guard.skipped = state_dict["step"], state_dict["skipped_steps"]
        self.ntokens_seen = state_dict["tokens_seen"] // self.runtime.dp_world_size
        self.objective = state_dict["objective"]
        # Earlier versions have neither of these.
        self.objective_step = state_dict.get("objective_step", self.step)
        self._max_steps_before = state_dict.get("max_steps")
        self.sources.load_state_dict(state_dict.get("source_tokens", {}))

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
