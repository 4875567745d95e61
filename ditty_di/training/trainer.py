"""The trainer: torchtitan's, with all components injected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from ditty_di import protocols
from ditty_di.batch import Batch
from ditty_di.callbacks import Callback, Callbacks
from ditty_di.isolation import check_rows, copy_of_each_kind, isolation_of
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.optim.container import Optimizers, Schedulers
from ditty_di.parallelize.fits import Parts, require_fit
from ditty_di.parallelize.pipeline import SyncedPPRNG
from ditty_di.processors import PostProcessor, PreProcessor, Processors
from ditty_di.runtime import Runtime
from ditty_di.training import checks, setup
from ditty_di.training.accumulation import GradientAccumulation
from ditty_di.training.gradients import LossParameters
from ditty_di.training.loop import TrainingLoop
from ditty_di.training.non_finite import NonFiniteGuard
from ditty_di.training.rescue import StepBoundary
from ditty_di.training.saving import Saving
from ditty_di.training.sources import LossBySource, SourceMetrics
from ditty_di.training.step import TrainStep


class Trainer(TrainingLoop):
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
        processors = (*self.processors.preprocessors, *self.processors.postprocessors)
        self._around_model = (loss_fn, *processors)

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
        modules = (*self.model_parts, *self._around_model)
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
