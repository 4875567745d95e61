"""One optimizer step: forward and backward passes, clipping, and an update or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils

from ditty_di.batch import Batch
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.processors import Processors
from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime
from ditty_di.training.gradients import LossParameters, MetricAccumulator, clip_grad_norm


def _raise_non_finite(values: dict[str, float], num_valid_global: Tensor) -> None:
    raise FloatingPointError(f"not finite: {values}, {num_valid_global.tolist()} valid elements")


class TrainStep:
    """Do one optimizer step on the micro-batches of all ranks.

    Args:
        parts: the model as this rank trains it.
        loss_fn: see `ditty_di.protocols.Loss`.
        optimizer: over the parameters of the model and of the loss.
        runtime: device and layout.
        scaler: gradient scaler for float16; None is a disabled one.
        max_norm: largest global L2 norm of the gradients; `inf` only computes it.
        processors: its postprocessors run between model and loss.
        loss_parameters: parameters of the loss; None for a loss without.
        prepare_inputs: turns a micro-batch on the device into the model's arguments and the labels.
        pp_size: micro-batches of the pipeline schedule.
        before_update: called before parameters change.
        on_non_finite: called instead of an update, with loss and gradient norm and the global
            count; None raises FloatingPointError.

    Attributes:
        metrics: the metrics of the loss, added up over the step.
    """

    def __init__(
        self,
        *,
        parts: ModelParts,
        loss_fn: Loss,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float = 1.0,
        processors: Processors | None = None,
        loss_parameters: LossParameters | None = None,
        prepare_inputs: Callable[[Batch], Batch] = lambda batch: batch,
        pp_size: int = 1,
        before_update: Callable[[], None] = lambda: None,
        on_non_finite: Callable[[dict[str, float], Tensor], None] = _raise_non_finite,
    ) -> None:
        self.parts, self.loss_fn, self.optimizer, self.runtime = parts, loss_fn, optimizer, runtime
        self.scaler = scaler or torch.amp.GradScaler(runtime.device.type, enabled=False)
        self.max_norm = max_norm
        self.processors = processors or Processors()
        self.loss_parameters = loss_parameters or LossParameters(loss_fn, parts.modules, runtime)
        self.parameters = parts.parameters()
        self.prepare_inputs, self.pp_size = prepare_inputs, pp_size
        self.before_update, self.on_non_finite = before_update, on_non_finite
        self.metrics = MetricAccumulator(runtime)
        self.spmd_context = dist_utils.get_spmd_context(parallel_dims=runtime.parallel_dims)

    def __call__(self, micro_batches: list[Batch], num_valid_global: Tensor) -> dict[str, float]:
        """Do forward and backward passes, and update the parameters if all values are finite.

        Args:
            micro_batches: this rank's micro-batches; all ranks have the same number.
            num_valid_global: valid elements over all micro-batches and ranks, on the CPU.

        Returns:
            `loss` and `grad_norm` over all ranks.
        """
        self.optimizer.zero_grad()
        loss = self.forward_backward(micro_batches, num_valid_global.to(self.runtime.device))
        self.loss_parameters.reduce()
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_grad_norm(
            self.parameters,
            self.loss_parameters.trained,
            self.max_norm,
            pp_mesh=self.runtime.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.runtime.parallel_dims.ep_enabled,
        )
        measured = [self.metrics.sum(loss), grad_norm.to(self.runtime.device)]
        # The only wait for the device in a step.
        total, norm = torch.stack([value.double() for value in measured]).tolist()
        values = {"loss": total, "grad_norm": norm}
        if num_valid_global.any() and math.isfinite(total) and math.isfinite(norm):
            self.before_update()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.on_non_finite(values, num_valid_global)
        return values

    def forward_backward(self, micro_batches: list[Batch], num_valid_global: Tensor) -> Tensor:
        """Accumulate the gradients of all micro-batches.

        Args:
            micro_batches: this rank's micro-batches.
            num_valid_global: valid elements over all micro-batches and ranks, on the device.

        Returns:
            This rank's part of the loss, shape `[]`.
        """
        batches = [batch.to(self.runtime.device) for batch in micro_batches]
        if self.parts.schedule is not None:
            # One schedule runs all micro-batches of the step.
            batches = [self.prepare_inputs(batch) for batch in batches]
            with self.spmd_context():
                total, of_batches = self.parts.run_schedule(batches, num_valid_global, self.pp_size)
            self.metrics.add(*of_batches)
            return total
        total = torch.zeros((), device=self.runtime.device)
        for n, batch in enumerate(batches, start=1):
            if len(batches) > 1:
                self.parts.set_requires_gradient_sync(n == len(batches))  # reduce once per step
            batch = self.prepare_inputs(batch)
            with self.spmd_context():
                output = self.forward(batch)
                loss, metrics = self.loss_fn(output, batch, num_valid_global)
                del output
                with spmd.no_typecheck():
                    self.scaler.scale(loss).backward()
            self.metrics.add(metrics)
            total += loss.detach()
        return total

    def forward(self, batch: Batch) -> Any:
        """Return the model's output after the postprocessors.

        Args:
            batch: a batch on the device, after the preprocessors.
        """
        return self.processors.finish(self.run_model(batch.inputs), batch, self.loss_fn)

    def run_model(self, inputs: dict[str, Any]) -> Any:
        """Return the model's output.

        Args:
            inputs: its arguments on the device; `"input"` is the positional one.
        """
        with self.spmd_context():
            return self.parts.forward(inputs)
