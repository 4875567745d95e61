"""One optimizer step of the trainer: a window of micro-batches, and an update or none."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import spmd_types as spmd
import torch
from torch import Tensor

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.trainer

from ditty_di.assembly import to_device
from ditty_di.gradients import clip_grad_norm
from ditty_di.processors.context import Context

if TYPE_CHECKING:
    from ditty_di.gradients import LossParameters, Shares
    from ditty_di.parallelize.pipeline import AlikeOnStages, Parts
    from ditty_di.processors import Processors
    from ditty_di.protocols import Batch
    from ditty_di.rescue import StepBoundary
    from ditty_di.runtime import Runtime
    from ditty_di.skipping import SkipBudget
    from ditty_di.window import Windows


log = logging.getLogger(__name__)

#: Steps with a gradient norm of exactly 0 after which a warning is due.
ZERO_GRADIENTS = 10


class Stepping(torchtitan.trainer.Trainer):
    """torchtitan's trainer whose step is a window of an injected loss.

    What the loss weighs in a window is summed over all micro-batches and ranks before the first
    backward pass. A subclass sets what it works with.
    """

    runtime: Runtime
    parts: Parts
    processors: Processors
    windows: Windows
    parameters: list[Tensor]
    loss_parameters: LossParameters
    shares: Shares
    alike_on_stages: AlikeOnStages
    skips: SkipBudget
    boundary: StepBoundary
    grad_scaler: torch.amp.GradScaler
    max_norm: float
    last_loss: float | None
    zero_gradients = 0

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The model's output for one micro-batch of inputs, moved to the device."""
        inputs = to_device(self.device, inputs)
        with self.train_context():
            return self.model_parts[0](
                inputs["input"], **{k: v for k, v in inputs.items() if k != "input"}
            )

    def prepare(self, batch: Batch) -> Batch | None:
        """The loader's batch as the preprocessors leave it; None when one of them rejects it."""
        with self.alike_on_stages(self.step) if self.parallel_dims.pp_enabled else nullcontext():
            return self.processors.prepare(
                batch,
                epoch=getattr(self.dataloader, "epoch", 0),
                step=self.step,
                total_steps=self.config.training.steps,
                device=self.device,
                model=self.model_parts[0],
            )

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One window: an update on all ranks or on none. One that is all rejected is none."""
        window, counts = self.windows.take(data_iterator)
        learning_rates = self.lr_schedulers.get_metrics()
        self.shares.clear()
        values = self._learn(window, counts) if window else {}
        self.boundary.changed = "the update of the learning rate failed"
        self.lr_schedulers.step()
        self.boundary.changed, self.boundary.in_step = None, False
        if self.metrics_processor.should_log(self.step):
            # A loss may call a metric of its own as one of these: theirs count.
            values = self.shares.metrics() | self.windows.get_metrics() | learning_rates | values
            (values["tokens_seen"],) = self.runtime.sum([self.ntokens_seen])
            self.metrics_processor.log(self.step, values)

    def _learn(self, window: list[Batch], counts: Tensor) -> dict[str, float]:
        """Forward, backward, and the update if all is finite; loss and gradient norm."""
        self.optimizers.zero_grad()
        loss = self._run_window(window, counts.to(self.device))
        self.loss_parameters.reduce()
        self.grad_scaler.unscale_(self.optimizer)
        grad_norm = clip_grad_norm(
            self.parameters,
            self.loss_parameters.trained,
            self.max_norm,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        values = {"loss": self.shares.total(loss), "grad_norm": float(grad_norm)}
        if counts.any() and all(map(math.isfinite, values.values())):
            if self.checkpointer:
                self.checkpointer.maybe_wait_for_staging()
            self.boundary.changed = "the update of the parameters failed"
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.skips.pass_over(self.step, values, counts, self.windows.taken)
        self.last_loss = values["loss"]
        self._watch(values["grad_norm"])
        return values

    def _watch(self, grad_norm: float) -> None:
        """Warn once when nothing has been learnt for several steps."""
        self.zero_gradients = self.zero_gradients + 1 if grad_norm == 0.0 else 0
        if self.zero_gradients == ZERO_GRADIENTS:
            log.warning(
                "step %d: the gradient norm has been exactly 0 for %d steps, so nothing is learnt; "
                "the loss may not depend on what is trained any more (too high a learning rate "
                "does that), or parts of the graph are detached",
                self.step,
                ZERO_GRADIENTS,
            )

    def _run_window(self, window: list[Batch], global_count: Tensor) -> Tensor:
        """Forward and backward of every micro-batch; this rank's share of the loss."""
        moved = [(to_device(self.device, x), y.to(self.device)) for x, y in window]
        if self.parallel_dims.pp_enabled:
            # The window's micro-batches are the pipeline's: one schedule runs them all.
            placed = [self.post_dataloading_process(*batch) for batch in moved]
            with self.train_context():
                total, metrics = self.parts.run_schedule(
                    placed, global_count, self.gradient_accumulation_steps
                )
            self.shares.add(*metrics)
            return total
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(moved, start=1):
            if self.gradient_accumulation_steps > 1:
                self.parts.sync_gradients(i == len(moved))  # they travel once a window
            inputs, labels, keywords = self.post_dataloading_process(*batch)
            total += self._forward_backward_body(inputs, labels, global_count, keywords)
        return total

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Any
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """As inherited. A context goes past it: the loader's labels are what it counts."""
        if not isinstance(labels, Context):
            return super().post_dataloading_process(input_dict, labels)
        _, loaded = labels["original_batch"]
        inputs, _, keywords = super().post_dataloading_process(input_dict, loaded)
        return inputs, labels, keywords

    def _forward_backward_body(
        self, inputs: Tensor, labels: Any, global_count: Tensor, extra_kwargs: dict[str, Any]
    ) -> Tensor:
        with self.train_context():
            output = self.model_parts[0](inputs, **extra_kwargs)
            loss, metrics = self.loss_fn(output, labels, global_count)
            del output
            with spmd.no_typecheck():
                self.grad_scaler.scale(loss).backward()
        self.shares.add(metrics)
        return loss.detach()
