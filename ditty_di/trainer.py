"""The trainer: torchtitan's, with everything injected and nothing owned that was not given."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils
import torchtitan.trainer
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.tools.utils import GarbageCollection

from ditty_di import assembly, protocols
from ditty_di.assembly import to_device
from ditty_di.checkpoint.states import ModelState, OptimizerState, RNGState, SchedulerState
from ditty_di.metrics.metrics import Metrics
from ditty_di.optim.container import Optimizers, Schedulers
from ditty_di.runtime import Runtime
from ditty_di.window import Windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Section:
    steps: int = 0
    disable_cuda_graphs: bool = True
    spmd_backend: str = "partial_dtensor"
    context_parallel_load_balancer: str | None = None
    context_parallel_ptrr_mask_key: str | None = None


@dataclass(frozen=True)
class InheritedConfig:
    """All that methods inherited from torchtitan's Trainer read from `self.config`."""

    training: _Section = field(default_factory=_Section)
    parallelism: _Section = field(default_factory=_Section)


class Trainer(torchtitan.trainer.Trainer):
    """Trains an injected model with injected parts, one optimizer step a window.

    A window is `gradient_accumulation_steps` micro-batches on every data-parallel rank. What the
    loss weighs in it (`loss_fn.count`) is summed over all of them in one reduction before the
    first backward pass, so that any split of the same rows gives the same gradients.

    Args:
        model: any `nn.Module`, on meta (then `weights` fills it) or with its values.
        loss_fn, optimizer, lr_scheduler, dataloader, weights, parallelize_fn, pipeline_fn,
            validator, checkpointer, metrics: see `ditty_di.protocols`.
        steps: optimizer steps in all; what a resumed run has done already counts.
        runtime: device, ranks and seeds; a default one when None.
        global_batch_size: rows an optimizer step over all ranks; None is one micro-batch a rank.
        max_norm: gradients are clipped to this global L2 norm; `inf` only measures it.
        max_skipped_steps: how many windows without a finite loss and gradient (or without a
            single label) may be passed over, with no update on any rank, before training fails.
        grad_scaler: `torch.amp.GradScaler` for float16; its overflows are not counted as skipped.
        profiler: a partial of `torchtitan.tools.profiler.Profiler`, started with the first step.
        gc_every: steps between collections of Python's garbage, the same on all ranks.

    Raises:
        ValueError: a part that does not fit the others; the message names the slot.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss_fn: protocols.Loss,
        optimizer: protocols.OptimizerFactory,
        lr_scheduler: protocols.SchedulerFactory,
        dataloader: protocols.DataLoaderFactory | protocols.DataLoader,
        steps: int,
        runtime: Runtime | None = None,
        weights: protocols.WeightsFn | None = None,
        parallelize_fn: protocols.ParallelizeFn | None = None,
        pipeline_fn: protocols.PipelineFn | None = None,
        validator: protocols.ValidatorFactory | None = None,
        checkpointer: protocols.CheckpointerFactory | None = None,
        metrics: protocols.Metrics | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        profiler: protocols.ProfilerFactory | None = None,
        global_batch_size: int | None = None,
        max_norm: float = 1.0,
        max_skipped_steps: int = 0,
        gc_every: int = 1000,
    ) -> None:
        if steps < 1:
            raise ValueError(f"trainer.steps={steps}: at least one step is needed")
        self.runtime = runtime = runtime or Runtime()
        self.device, self.parallel_dims = runtime.device, runtime.parallel_dims
        self.config = InheritedConfig(
            training=_Section(steps=steps),
            parallelism=_Section(spmd_backend=self.parallel_dims.spmd_backend),
        )
        self.max_norm, self.max_skipped_steps = max_norm, max_skipped_steps
        self.step = self.ntokens_seen = self.skipped_steps = 0
        self.objective: float | None = None
        self.last_loss: float | None = None

        self.loss_fn = loss_fn
        self.model_config = getattr(model, "config", None)
        self.parts = assembly.place_model(
            model,
            runtime=runtime,
            loss_fn=loss_fn,
            weights=weights,
            parallelize_fn=parallelize_fn,
            pipeline_fn=pipeline_fn,
        )
        self.model_parts = self.parts.modules
        self.parameters = [p for part in self.model_parts for p in part.parameters()]
        self.loss_mesh = self.parallel_dims.get_optional_mesh("loss")
        self.pp_mesh = self.parallel_dims.get_optional_mesh("pp")
        self.optimizers = Optimizers(optimizer, self.model_parts)
        self.optimizer = self.optimizers.optimizer
        self.lr_schedulers = Schedulers(lr_scheduler, self.optimizer)
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(self.device.type, enabled=False)

        self.dataloader = assembly.place_dataloader(dataloader, runtime)
        self.gradient_accumulation_steps = assembly.accumulation_steps(
            global_batch_size, dataloader=self.dataloader, runtime=runtime
        )
        self.windows = Windows(self.gradient_accumulation_steps, loss_fn=loss_fn, runtime=runtime)
        self.metrics_processor = metrics or Metrics()
        self.profiler = profiler
        self.checkpointer = self._checkpointed(checkpointer) if checkpointer else None
        self.validator: protocols.Validator | None = None
        if validator:
            self.validator = validator(
                model_parts=self.model_parts, forward=self.forward, loss_fn=loss_fn, runtime=runtime
            )
        self.train_context = dist_utils.get_spmd_context(parallel_dims=self.parallel_dims)
        self.fwd_bwd_fn = self._forward_backward_body
        self.gc_every = gc_every

    def _checkpointed(self, checkpointer: protocols.CheckpointerFactory) -> protocols.Checkpointer:
        assembly.require_state(self.dataloader)
        states: dict[str, Any] = {
            "model": ModelState(self.model_parts),
            "optimizer": OptimizerState(self.optimizer),
            "lr_scheduler": SchedulerState(self.lr_schedulers.scheduler),
            "data": self.dataloader,
            "train_state": self,
        }
        if self.grad_scaler.is_enabled():
            states["grad_scaler"] = self.grad_scaler
        return checkpointer(states=states, rank_states={"rng": RNGState()})

    # -- one step -----------------------------------------------------------------------------

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The model's output for one micro-batch of inputs, moved to the device."""
        inputs = to_device(self.device, inputs)
        with self.train_context():
            return self.model_parts[0](
                inputs["input"], **{k: v for k, v in inputs.items() if k != "input"}
            )

    def _forward_backward_body(
        self, inputs: Tensor, labels: Tensor, global_count: Tensor, extra_kwargs: dict[str, Any]
    ) -> Tensor:
        with self.train_context():
            output = self.model_parts[0](inputs, **extra_kwargs)
            loss, metrics = self.loss_fn(output, labels, global_count)
            del output
            with spmd.no_typecheck():
                self.grad_scaler.scale(loss).backward()
        for name, value in metrics.items():
            self._loss_metrics[name] = self._loss_metrics.get(name, 0.0) + value.detach()
        return loss.detach()

    def pp_forward_backward_step(
        self,
        *,
        input_dict_mbs: list[dict[str, Tensor]],
        label_mbs: list[Tensor],
        global_valid_tokens: Tensor,
    ) -> Tensor:
        window = list(map(self.post_dataloading_process, input_dict_mbs, label_mbs))
        with self.train_context():
            return self.parts.run_schedule(window, global_valid_tokens)

    def train_step(self, data_iterator: Iterator[protocols.Batch]) -> None:
        """One window: counts, forward and backward, then an update on all ranks or on none."""
        window, counts = self.windows.take(data_iterator)
        self.optimizers.zero_grad()
        learning_rates = self.lr_schedulers.get_metrics()
        self._loss_metrics: dict[str, Tensor | float] = {}
        loss = self._run_window(window, counts.to(self.device))

        self.grad_scaler.unscale_(self.optimizer)
        grad_norm = dist_utils.clip_grad_norm_(
            self.parameters,
            self.max_norm,
            foreach=True,
            pp_mesh=self.pp_mesh,
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        values = {"loss": self._reduced(loss), "grad_norm": float(grad_norm)}
        if counts.any() and all(map(math.isfinite, values.values())):
            if self.checkpointer:
                self.checkpointer.maybe_wait_for_staging()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self._skip(values, counts, len(window))
        self.lr_schedulers.step()
        if self.metrics_processor.should_log(self.step):
            extra = {name: self._reduced(value) for name, value in self._loss_metrics.items()}
            (seen,) = self.runtime.sum([self.ntokens_seen])
            self.metrics_processor.log(
                self.step, {**values, **extra, **learning_rates, "tokens_seen": seen}
            )
        self.last_loss = values["loss"]

    def _run_window(self, window: list[protocols.Batch], global_count: Tensor) -> Tensor:
        """Forward and backward of every micro-batch; this rank's share of the loss."""
        window = [(to_device(self.device, x), y.to(self.device)) for x, y in window]
        if self.parallel_dims.pp_enabled:
            # The window's micro-batches are the pipeline's: one schedule runs them all.
            return self.forward_backward_step(
                input_dict=[inputs for inputs, _ in window],
                labels=[labels for _, labels in window],
                global_valid_tokens=global_count,
            )
        total = torch.zeros((), device=self.device)
        for i, (inputs, labels) in enumerate(window, start=1):
            if self.gradient_accumulation_steps > 1:
                self.parts.sync_gradients(i == len(window))  # they travel once a window
            total += self.forward_backward_step(
                input_dict=inputs, labels=labels, global_valid_tokens=global_count
            )
        return total

    def _reduced(self, value: Tensor | float) -> float:
        """The sum over ranks of a value that each rank has its share of."""
        total = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        for mesh in (self.loss_mesh, self.pp_mesh):
            if mesh is not None:
                total = dist_utils.dist_sum_tensor(total, mesh)
        return float(total)

    def _skip(self, values: dict[str, float], counts: Tensor, micro_batches: int) -> None:
        """Passes over a window without an update, on every rank, while the budget lasts."""
        if self.grad_scaler.is_enabled():
            # Every rank sets the scale, also one whose own shard of the gradient was finite.
            factor = self.grad_scaler.get_backoff_factor() if counts.any() else 1.0
            self.grad_scaler.update(new_scale=self.grad_scaler.get_scale() * factor)
            if counts.any() and math.isfinite(values["loss"]):
                return  # an overflow is the scaler's business
        self.skipped_steps += 1
        what = f"is not finite: {values}" if counts.any() else "has no label to learn from"
        rows = getattr(self.dataloader, "last_rows", lambda n: "unknown")(micro_batches)
        message = f"step {self.step} {what} (rank {self.runtime.rank} had rows {rows})"
        if self.skipped_steps > self.max_skipped_steps:
            raise FloatingPointError(
                f"{message}; nothing was updated. trainer.max_skipped_steps="
                f"{self.skipped_steps} would pass over it"
            )
        log.warning("%s; skipped %d of %d", message, self.skipped_steps, self.max_skipped_steps)

    # -- the whole training -------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to `steps`.

        Returns:
            status (`finished` or `preempted`), step, objective (the last validation loss, else
            the last training loss), skipped_steps, and the metrics' summary.
        """
        self.runtime.catch_signals()
        gc_was_enabled = gc.isenabled()
        self.gc_handler = GarbageCollection(gc_freq=self.gc_every)  # takes it over
        try:
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
            if exhausted:
                log.warning("the data ended after step %d", self.step)
            if self.checkpointer:
                self.checkpointer.save(self.step, force=True)
        except BaseException:
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
            "skipped_steps": self.skipped_steps,
            **self.metrics_processor.summary(),
        }

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
            self._validate(last=not self.should_continue_training())
            if self.checkpointer:
                with self.metrics_processor.pause():
                    self.checkpointer.save(self.step)
            if profiler:
                profiler.step()
            if self.step == first:
                # Lazy initialisation and compilation are over: what takes longer now, hangs.
                timeout = timedelta(seconds=self.runtime.train_timeout)
                dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
        return False

    def _validate(self, *, last: bool) -> None:
        """Validates when it is due; a stop request that comes meanwhile ends both."""
        if self.validator is None:
            self.objective = self.last_loss
        elif not self.windows.stopping and (last or self.validator.should_validate(self.step)):
            with self.metrics_processor.pause():
                values = self.validator.validate(self.step)
            if not values:
                self.windows.stopping = True
                return
            self.objective = values["loss"]
            named = {f"validation/{name}": value for name, value in values.items()}
            self.metrics_processor.log(self.step, named)
            for name, text in self.validator.samples.items():
                self.metrics_processor.text(self.step, name, text)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens_seen": self.ntokens_seen * self.runtime.dp_world_size,
            "skipped_steps": self.skipped_steps,
            "objective": self.objective,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.skipped_steps = state_dict["step"], state_dict["skipped_steps"]
        self.ntokens_seen = state_dict["tokens_seen"] // self.runtime.dp_world_size
        self.objective = state_dict["objective"]
