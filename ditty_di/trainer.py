"""The trainer: torchtitan's, with everything injected and nothing owned that was not given."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.tools.utils import GarbageCollection

from ditty_di import assembly, protocols
from ditty_di.callbacks import Callback, Callbacks
from ditty_di.gradients import LossParameters, Shares, place_loss
from ditty_di.inherited import InheritedConfig, Section
from ditty_di.metrics.metrics import Metrics
from ditty_di.metrics.validation import evaluating
from ditty_di.optim.container import Optimizers, Schedulers
from ditty_di.parallelize.pipeline import AlikeOnStages
from ditty_di.processors import PostProcessor, PreProcessor, Processors
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
        if steps < 1:
            raise ValueError(f"trainer.steps={steps}: at least one step is needed")
        if not max_norm > 0:
            raise ValueError(f"trainer.max_norm={max_norm} must be above 0; inf clips nothing")
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
        self.checkpointer = checkpointer and assembly.place_checkpointer(
            checkpointer,
            model_parts=self.model_parts,
            weights=weights,
            loss_fn=loss_fn,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_schedulers.scheduler,
            dataloader=self.dataloader,
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
        isolation = assembly.isolation_of(
            self.model_parts[0],
            config=self.model_config,
            forward=self.forward,
            processors=self.processors,
            runtime=runtime,
        )
        for loader in (self.dataloader, getattr(self.validator, "dataloader", None)):
            assembly.check_rows(loader, isolation=isolation, runtime=runtime)

    rehearse = staticmethod(assembly.rehearse)

    def train(self) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to `steps`.

        Returns:
            status (`finished` or `preempted`), step, objective (the last validation loss, else
            the last training loss), skipped_steps, stopped (why `stop` was called, else None),
            rejected_batches with processors, and the metrics' summary.
        """
        self.runtime.catch_signals()
        gc_was_enabled = gc.isenabled()
        self.gc_handler = GarbageCollection(gc_freq=self.gc_every)  # takes it over
        try:
            self.callbacks.call("train_start", self)
            if self.checkpointer and self.checkpointer.load() is not None:
                log.info("resumed after step %d of %d", self.step, self.config.training.steps)
            self.metrics_processor.start(
                model_parts=self.model_parts,
                total_steps=self.config.training.steps,
                runtime=self.runtime,
                step=self.step,
            )
            profiling = self.profiler(global_step=self.step) if self.profiler else nullcontext()
            with profiling as profiler:
                exhausted = self._run_steps(profiler)
            if self.stopped or exhausted:
                log.warning("ended after step %d: %s", self.step, self.stopped or "no more data")
            self._save(force=True)
            if self.checkpointer:
                self.checkpointer.maybe_wait_for_staging()  # a callback may change the weights
            self.callbacks.call("train_end", self)
        except BaseException as error:
            error.training_step = self.step  # type: ignore[attr-defined]  # for `ditty_di.failure`
            self.metrics_processor.close()  # what was measured until then is worth the most now
            raise
        finally:
            if gc_was_enabled:
                gc.enable()
            self.runtime.release_signals()
        finished = exhausted or not self.should_continue_training()
        return {
            "status": "finished" if finished else "preempted",
            "step": self.step,
            "objective": self.objective,
            "skipped_steps": self.skips.skipped,
            "stopped": self.stopped,
            **self.windows.get_metrics(),
            **self.metrics_processor.summary(),
        }

    def stop(self, reason: str) -> None:
        """Ends the training after this step, as if it had been the last.

        All ranks must call it at the same step (`runtime.any` tells whether one wants to).
        """
        self.stopped = reason

    def should_continue_training(self) -> bool:
        return self.stopped is None and super().should_continue_training()

    def _run_steps(self, profiler: Any) -> bool:
        """Steps until the end or a stop request; whether the data ended first."""
        data = self.batch_generator(self.dataloader)
        first = self.step + 1
        if self.step == 0:
            self._validate(last=False)
        while self.should_continue_training() and not self.windows.stopping:
            self.step += 1
            self.gc_handler.run(self.step)
            try:
                self.train_step(data)
            except DataloaderExhaustedError:
                self.step -= 1
                if self.step == 0:
                    raise ValueError("dataloader: it yields no batch on some rank") from None
                self._validate(last=True)
                return True
            self.callbacks.call("step_end", self)
            self._validate(last=not self.should_continue_training())
            self._save()
            if profiler:
                profiler.step()
            if self.step == first:
                # Lazy initialisation and compilation are over: what takes longer now, hangs.
                timeout = timedelta(seconds=self.runtime.train_timeout)
                dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
        return False

    def _save(self, *, force: bool = False) -> None:
        if self.checkpointer:
            with self.metrics_processor.pause():
                if self.checkpointer.save(self.step, force=force):
                    self.callbacks.call("checkpoint_saved", self)

    def _validate(self, *, last: bool) -> None:
        """Validates when it is due; a stop request that comes meanwhile ends both."""
        if self.validator is None:
            self.objective = self.last_loss
        elif not self.windows.stopping and (last or self.validator.should_validate(self.step)):
            with self.metrics_processor.pause(), evaluating(self.around):
                values = self.validator.validate(self.step)
            if not values:
                self.windows.stopping = True
                return
            self.objective = values["loss"]
            named = {f"validation/{name}": value for name, value in values.items()}
            self.metrics_processor.log(self.step, named)
            with self.metrics_processor.pause():
                self.callbacks.call("validation_end", self)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens_seen": self.ntokens_seen * self.runtime.dp_world_size,
            "skipped_steps": self.skips.skipped,
            "objective": self.objective,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.skips.skipped = state_dict["step"], state_dict["skipped_steps"]
        self.ntokens_seen = state_dict["tokens_seen"] // self.runtime.dp_world_size
        self.objective = state_dict["objective"]
