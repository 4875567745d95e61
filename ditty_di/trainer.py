"""The trainer: torchtitan's, with everything injected and nothing owned that was not given."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.tools.utils import GarbageCollection

from ditty_di import assembly, checks, protocols
from ditty_di.callbacks import Callback, Callbacks
from ditty_di.checkpoint import CheckpointError
from ditty_di.gradients import LossParameters, Shares, place_loss
from ditty_di.inherited import InheritedConfig, Section
from ditty_di.isolation import check_rows, isolation_of, rehearse
from ditty_di.metrics.metrics import Metrics
from ditty_di.metrics.validation import evaluating
from ditty_di.optim.container import Optimizers, Schedulers
from ditty_di.parallelize.pipeline import AlikeOnStages
from ditty_di.precision.casting import release_copies
from ditty_di.processors import PostProcessor, PreProcessor, Processors
from ditty_di.rescue import Rescue, StepBoundary
from ditty_di.runtime import Runtime
from ditty_di.skipping import SkipBudget
from ditty_di.stepping import Stepping
from ditty_di.window import Windows

log = logging.getLogger(__name__)


class Trainer(Stepping):
    """Trains an injected model with injected parts, one optimizer step a window.

    A window is `gradient_accumulation_steps` micro-batches on every data-parallel rank. What the
    loss weighs in it (`loss_fn.count`) is summed over all of them in one reduction before the
    first backward pass, so that any split of the same rows gives the same gradients.

    Args:
        model: any `nn.Module`, on meta (then `weights` fills it) or with its values.
        loss_fn, optimizer, lr_scheduler, dataloader, weights, parallelize_fn, pipeline_fn,
            validator, checkpointer, metrics: see `ditty_di.protocols`. Without an `lr_scheduler`
            the learning rate is constant. A `loss_fn` may be any callable of output and labels
            that returns a mean over rows (`ditty_di.losses.PlainLoss`).
        steps: optimizer steps in all; what a resumed run has done already counts.
        runtime: device, ranks and seeds; a default one when None.
        global_batch_size: rows an optimizer step over all ranks; None is one micro-batch a rank.
        max_norm: gradients are clipped to this global L2 norm; `inf` only measures it.
        max_skipped_steps: how many windows without a finite loss and gradient (or without a
            single label) may be passed over, with no update on any rank, before training fails.
        grad_scaler: `torch.amp.GradScaler` for float16; its overflows are not counted as skipped.
        profiler: a partial of `torchtitan.tools.profiler.Profiler`, started with the first step.
        preprocessors, postprocessors: what a batch passes before the model, and the model's output
            before the loss (`ditty_di.processors`).
        model_contract: what the model takes and gives, where its class does not say.
        contracts: `static` follows them from the loader to the loss before anything is built on
            them; `runtime` compares them with the tensors of the first batch as well, and
            `every_batch` with those of every one.
        parallelize_loss_fn: shards the parameters of a loss; without it every rank has them whole.
        callbacks: by name, called in their order (`ditty_di.callbacks`).
        gc_every: steps between collections of Python's garbage, the same on all ranks.

    Raises:
        ValueError, TypeError: a part that does not fit the others; the message names the slot.
    """

    validate = staticmethod(checks.validate)
    rehearse = staticmethod(rehearse)

    @checks.known_arguments
    def __init__(
        self,
        *,
        model: nn.Module,
        loss_fn: protocols.Loss | protocols.LossFunction,
        optimizer: protocols.OptimizerFactory,
        dataloader: protocols.DataLoaderFactory | protocols.DataLoader,
        steps: int,
        lr_scheduler: protocols.SchedulerFactory | None = None,
        runtime: Runtime | None = None,
        weights: protocols.WeightsFn | None = None,
        parallelize_fn: protocols.ParallelizeFn | None = None,
        pipeline_fn: protocols.PipelineFn | None = None,
        validator: protocols.ValidatorFactory | None = None,
        checkpointer: protocols.CheckpointerFactory | None = None,
        metrics: protocols.Metrics | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        profiler: protocols.ProfilerFactory | None = None,
        preprocessors: Sequence[PreProcessor] = (),
        postprocessors: Sequence[PostProcessor] = (),
        model_contract: str | None = None,
        contracts: Literal["static", "runtime", "every_batch"] = "static",
        parallelize_loss_fn: protocols.ParallelizeFn | None = None,
        callbacks: Mapping[str, Callback | None] | None = None,
        global_batch_size: int | None = None,
        max_norm: float = 1.0,
        max_skipped_steps: int = 0,
        gc_every: int = 1000,
    ) -> None:
        if steps is None:
            raise ValueError(
                "trainer.steps=None: give the number of optimizer steps, such as steps=1000; "
                "ditty_di.data.horizon counts it from epochs"
            )
        self.validate(
            steps=steps,
            max_norm=max_norm,
            global_batch_size=global_batch_size,
            max_skipped_steps=max_skipped_steps,
            gc_every=gc_every,
        )
        if grad_scaler and runtime and runtime.parallel_dims.pp_enabled:
            raise ValueError("grad_scaler: a pipeline does not scale its loss; use precision=bf16")
        self.runtime = runtime = runtime or Runtime()
        self.device, self.parallel_dims = runtime.device, runtime.parallel_dims
        self.config = InheritedConfig(
            training=Section(steps=steps),
            parallelism=Section(spmd_backend=self.parallel_dims.spmd_backend),
        )
        self.max_norm = max_norm
        self.step = self.ntokens_seen = 0
        self.objective: float | None = None
        self.objective_step: int | None = None
        self.steps_before: int | None = None
        self.last_loss: float | None = None
        self.stopped: str | None = None

        self.callbacks = Callbacks(callbacks or {})
        self.processors = assembly.place_processors(
            Processors(preprocessors, postprocessors),
            runtime=runtime,
            contracts=contracts,
            around={
                "loader": dataloader,
                "model": model,
                "model_contract": model_contract,
                "loss": loss_fn,
            },
        )
        loss_fn = place_loss(loss_fn, runtime, parallelize_loss_fn)
        self.loss_fn = self.processors.before(loss_fn)
        self.model_config = getattr(model, "config", None)
        self.parts = assembly.place_model(
            model,
            runtime=runtime,
            loss_fn=self.loss_fn,
            weights=weights,
            parallelize_fn=parallelize_fn,
            pipeline_fn=pipeline_fn,
        )
        self.model_parts = self.parts.modules
        self.parameters = [p for part in self.model_parts for p in part.parameters()]
        self.loss_parameters = LossParameters(loss_fn, self.model_parts, runtime)
        self.shares = Shares(runtime)
        self.alike_on_stages = AlikeOnStages(runtime)
        self.optimizers = Optimizers(optimizer, self.model_parts, self.loss_parameters.named)
        self.optimizer = self.optimizers.optimizer
        self.lr_schedulers = Schedulers(lr_scheduler, self.optimizer)
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(self.device.type, enabled=False)

        self.dataloader = assembly.place_dataloader(dataloader, runtime)
        self.skips = SkipBudget(
            max_skipped_steps,
            scaler=self.grad_scaler,
            rank=runtime.rank,
            dataloader=self.dataloader,
        )
        self.gradient_accumulation_steps = assembly.accumulation_steps(
            global_batch_size, dataloader=self.dataloader, runtime=runtime
        )
        self.windows = Windows(
            self.gradient_accumulation_steps,
            loss_fn=self.loss_fn,
            runtime=runtime,
            prepare=self.prepare if self.processors else None,
        )
        self.metrics_processor = metrics or Metrics()
        self.profiler = profiler
        if checkpointer:
            assembly.require_state(self.dataloader)
        self.boundary = StepBoundary(
            dataloader=self.dataloader if checkpointer else None,
            states={"train_state": self, "windows": self.windows},
            modules=[
                module
                for module in (*self.model_parts, loss_fn, *preprocessors, *postprocessors)
                if isinstance(module, nn.Module)
            ],
            device=self.device,
        )
        self.trained = (*self.model_parts, loss_fn)
        self.rescue = Rescue(
            self.boundary,
            progress=self,
            save=self._save_at_failure if checkpointer else None,
            unfit=partial(checks.non_finite_parameters, self.trained),
            rank=runtime.rank,
        )
        self.saved_step = 0
        self.checkpointer = checkpointer and assembly.place_checkpointer(
            checkpointer,
            model_parts=self.model_parts,
            weights=weights,
            loss_fn=loss_fn,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_schedulers.scheduler,
            dataloader=self.boundary.position,
            grad_scaler=self.grad_scaler,
            callbacks=self.callbacks,
            processors=self.processors,
            windows=self.windows,
            train_state=self,
        )
        self.validator: protocols.Validator | None = None
        if validator:
            self.validator = validator(
                model_parts=self.model_parts,
                forward=self.forward,
                loss_fn=self.loss_fn,
                runtime=runtime,
                prepare=self.prepare,
            )
        self.around = (loss_fn, *self.processors.preprocessors, *self.processors.postprocessors)
        self.train_context = dist_utils.get_spmd_context(parallel_dims=self.parallel_dims)
        self.gc_every = gc_every
        isolation = isolation_of(
            self.model_parts[0],
            config=self.model_config,
            forward=self.forward,
            processors=self.processors,
            runtime=runtime,
        )
        for loader in (self.dataloader, getattr(self.validator, "dataloader", None)):
            check_rows(loader, isolation=isolation, runtime=runtime)

    def train(self, *, restored: Callable[[], None] | None = None) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to `steps`.

        An exception of a step, a callback or the validator goes on up when the last complete step
        has been saved, if all ranks come to that.

        Args:
            restored: called on every rank once the checkpoint is loaded, or there is none.

        Returns:
            status (`finished` or `preempted`), step, objective (the last validation loss, else
            the last training loss), objective_step, skipped_steps, stopped (why `stop` was called,
            else None), rejected_batches with processors, and the metrics' summary.
        """
        self.runtime.catch_signals()
        gc_was_enabled = gc.isenabled()
        self.gc_handler = GarbageCollection(gc_freq=self.gc_every)  # takes it over
        try:
            self.callbacks.call("on_train_start", self)
            self._restore()
            if restored is not None:
                restored()
            if self.should_continue_training():  # what would fail later fails now
                checks.try_first_validation(self.validator, self.around)
                checks.require_space(self.checkpointer)
            self.metrics_processor.start(
                model_parts=self.model_parts,
                total_steps=self.config.training.steps,
                runtime=self.runtime,
                step=self.step,
            )
            profiling = self.profiler(global_step=self.step) if self.profiler else nullcontext()
            with profiling as profiler:
                exhausted = self._run_rescued(profiler)
            if self.stopped or exhausted:
                log.warning("ended after step %d: %s", self.step, self.stopped or "no more data")
            self._save(force=True)
            if self.checkpointer:
                self.checkpointer.maybe_wait_for_staging()  # a callback may change the weights
            self.callbacks.call("on_train_end", self)
        except BaseException as error:
            if not hasattr(error, "training_step"):  # for `ditty_di.launch.failure`
                error.training_step = self.step  # type: ignore[attr-defined]
            self.metrics_processor.close()  # what was measured until then is worth the most now
            raise
        finally:
            for part in self.model_parts:
                release_copies(part)  # whoever has the model sees its own parameters
            if gc_was_enabled:
                gc.enable()
            self.runtime.release_signals()
        finished = exhausted or not self.should_continue_training()
        if not finished:
            self._take_recent_objective()
        return {
            "status": "finished" if finished else "preempted",
            "step": self.step,
            "objective": self.objective,
            "objective_step": self.objective_step,
            "skipped_steps": self.skips.skipped,
            "stopped": self.stopped,
            **self.windows.get_metrics(),
            **self.metrics_processor.summary(),
        }

    def close(self) -> None:
        super().close()
        self.rescue.close()

    def _restore(self) -> None:
        steps = self.config.training.steps
        if self.checkpointer and self.checkpointer.load() is not None:
            self.saved_step = self.step
            if self.step > steps:
                log.warning(
                    "the checkpoint is at step %d, and steps=%d: nothing to do", self.step, steps
                )
            else:
                log.info("resumed after step %d of %d", self.step, steps)
                if self.steps_before not in (None, steps):
                    log.info(
                        "the run had steps=%s before; its learning rate goes on at %.3g",
                        self.steps_before,
                        self.lr_schedulers.get_metrics()["lr"],
                    )

    def stop(self, reason: str) -> None:
        """Ends the training after this step, as if it had been the last.

        All ranks must call it at the same step (`runtime.any` tells whether one wants to).
        """
        self.stopped = reason

    def should_continue_training(self) -> bool:
        return self.stopped is None and super().should_continue_training()

    def _run_rescued(self, profiler: Any) -> bool:
        """`_run_steps`; after an exception the last complete step is saved."""
        try:
            exhausted = self._run_steps(profiler)
            self.windows.raise_failure()
        except CheckpointError:
            raise  # saving is what failed
        except Exception as error:
            if (cause := self.rescue.after(error)) is error:
                raise
            raise cause from None
        return exhausted

    def _run_steps(self, profiler: Any) -> bool:
        """Steps until the end or a stop request; whether the data ended first."""
        data = self.batch_generator(self.dataloader)
        first = self.step + 1
        if self.step == 0:
            self._validate(last=False)
        elif self.validator and self.objective_step != self.step == self.config.training.steps:
            self._validate(last=True)  # it was what failed
        while self.should_continue_training() and not self.windows.stopping:
            if self.checkpointer:
                self.boundary.mark()
            self.step += 1
            self.gc_handler.run(self.step)
            try:
                self.train_step(data)
            except DataloaderExhaustedError:
                self.step -= 1
                self.boundary.in_step = False
                if self.step == 0:
                    raise ValueError("dataloader: it yields no batch on some rank") from None
                self._validate(last=True)
                return True
            self._call("on_step_end")
            self._validate(last=not self.should_continue_training())
            self._save()
            if profiler:
                profiler.step()
            if self.step == first:
                # Lazy initialisation and compilation are over: what takes longer now, hangs.
                timeout = timedelta(seconds=self.runtime.train_timeout)
                dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
                if self.should_continue_training():
                    checks.require_space(self.checkpointer)  # the optimizer has its state now
        return False

    def _call(self, moment: str) -> None:
        """Call the callbacks. One of several ranks that fails there tells the others at the next
        step: they are in no state to wait for it now."""
        try:
            self.callbacks.call(moment, self)
        except Exception as error:
            if self.runtime.world_size > 1:
                log.error("%s, step %d: %s: %s", moment, self.step, type(error).__name__, error)
            self.windows.fail(error)

    def _save_at_failure(self, group: Any) -> None:
        checkpointer: Any = self.checkpointer
        if group is not None and hasattr(checkpointer, "use_group"):
            checkpointer.use_group(group)
        if checkpointer.save(self.step, force=True):
            self.saved_step = self.step
        checkpointer.close()

    def _save(self, *, force: bool = False) -> None:
        if self.checkpointer:
            with self.metrics_processor.pause():
                due = force or not self.step % (getattr(self.checkpointer, "every", None) or 1)
                if due and self.step > self.saved_step:
                    checks.require_finite_parameters(self.step, self.trained, self.runtime)
                if self.checkpointer.save(self.step, force=force):
                    self.saved_step = self.step
                    self._call("on_save")

    def _validate(self, *, last: bool) -> None:
        """Validates when it is due; a stop request that comes meanwhile ends both."""
        if self.validator is None:
            self.objective, self.objective_step = self.last_loss, self.step
        elif not self.windows.stopping and (last or self.validator.should_validate(self.step)):
            with self.metrics_processor.pause(), evaluating(self.around):
                values = self.validator.validate(self.step)
            if not values:
                self.windows.stopping = True
                return
            self.objective, self.objective_step = values["loss"], self.step
            named = {f"validation/{name}": value for name, value in values.items()}
            self.metrics_processor.log(self.step, named)
            with self.metrics_processor.pause():
                self._call("on_validation_end")

    def _take_recent_objective(self) -> None:
        """Of a run that was stopped before it validated what it learnt: its training loss."""
        if self.step and not self.objective_step and self.last_loss is not None:
            self.objective, self.objective_step = self.last_loss, self.step

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens_seen": self.ntokens_seen * self.runtime.dp_world_size,
            "skipped_steps": self.skips.skipped,
            "objective": self.objective,
            "objective_step": self.objective_step,
            "steps": self.config.training.steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.skips.skipped = state_dict["step"], state_dict["skipped_steps"]
        self.ntokens_seen = state_dict["tokens_seen"] // self.runtime.dp_world_size
        self.objective = state_dict["objective"]
        # Earlier versions have neither of these.
        self.objective_step = state_dict.get("objective_step", self.step)
        self.steps_before = state_dict.get("steps")
