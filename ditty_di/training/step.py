"""One optimizer step: forward and backward passes, clipping, and an update or none."""

from __future__ import annotations

from collections.abc import Callable

import spmd_types as spmd
import torch
from torch import Tensor

from ditty_di.batch import Batch
from ditty_di.optim.fused import can_skip_on_device, step_unless
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.processors import Processors
from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime
from ditty_di.training.forward import ForwardPass
from ditty_di.training.gradients import (
    LossParameters,
    MetricAccumulator,
    clip_grad_norm,
    reduce_partial,
)
from ditty_di.training.non_finite import StepValues


def _raise_non_finite(values: StepValues, num_valid_global: Tensor) -> None:
    raise FloatingPointError(
        f"not finite: {dict(values)}, {num_valid_global.tolist()} valid elements"
    )


class TrainStep(ForwardPass):
    """Do one optimizer step on the micro-batches of all ranks.

    Args:
        parts: the model as this rank trains it.
        loss_fn: see `ditty_di.protocols.Loss`.
        optimizer: over the parameters of the model and of the loss.
        runtime: device and layout.
        scaler: gradient scaler for float16; None is a disabled one.
        max_grad_norm: largest global L2 norm of the gradients; `inf` only computes it.
        processors: its postprocessors run between model and loss.
        loss_parameters: parameters of the loss; None for a loss without.
        prepare_inputs: turns a micro-batch on the device into the model's arguments and the labels.
        pp_size: micro-batches of the pipeline schedule.
        before_update: called before parameters change.
        on_skip: called instead of an update, with loss and gradient norm and the global count;
            by default it raises FloatingPointError.
        defer_read: called after the backward pass; returns whether loss and gradient norm may be
            read after the step. Then the device decides about the update, if the optimizer can
            (`ditty_di.optim.fused`), and `on_skip` is not called.
        limits: called after `defer_read`; returns the largest loss and gradient norm with which to
            update. None compares neither.

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
        max_grad_norm: float = 1.0,
        processors: Processors | None = None,
        loss_parameters: LossParameters | None = None,
        prepare_inputs: Callable[[Batch], Batch] = lambda batch: batch,
        pp_size: int = 1,
        before_update: Callable[[], None] = lambda: None,
        on_skip: Callable[[StepValues, Tensor], None] = _raise_non_finite,
        defer_read: Callable[[], bool] = lambda: False,
        limits: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        super().__init__(
            parts=parts, loss_fn=loss_fn, runtime=runtime, processors=processors, pp_size=pp_size
        )
        self.optimizer = optimizer
        self.scaler = scaler or torch.amp.GradScaler(runtime.device.type, enabled=False)
        self.max_grad_norm = max_grad_norm
        self.loss_parameters = loss_parameters or LossParameters(loss_fn, parts.modules, runtime)
        self.parameters = parts.parameters()
        self.prepare_inputs = prepare_inputs
        self.before_update, self.on_skip = before_update, on_skip
        self.defer_read, self.limits = defer_read, limits
        self.metrics = MetricAccumulator(runtime, getattr(loss_fn, "summarize", None))

    def __call__(self, micro_batches: list[Batch], num_valid_global: Tensor) -> StepValues:
        """Do forward and backward passes, and update if loss and gradient norm are accepted.

        Args:
            micro_batches: this rank's micro-batches; all ranks have the same number.
            num_valid_global: valid elements over all micro-batches and ranks, on the CPU.

        Returns:
            `loss` and `grad_norm` over all ranks.
        """
        self.optimizer.zero_grad()
        loss = self.forward_backward(micro_batches, num_valid_global.to(self.runtime.device))
        grad_norm = self.clip_gradients()
        same = self.limits is not None
        values = StepValues(self.metrics.sum(loss), grad_norm, same_on_ranks=same)
        valid = bool(num_valid_global.any())
        deferred = self.defer_read() and valid and not self.scaler.is_enabled()
        if self.limits is not None:
            values.limits = self.limits()
        if deferred and can_skip_on_device(self.optimizer):
            self.before_update()
            step_unless(self.optimizer, values.rejected_on_device())
        elif valid and values.accepted():  # the only wait for the device in a step
            self.before_update()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.on_skip(values, num_valid_global)
        return values

    def clip_gradients(self) -> Tensor:
        """Complete the gradients that ranks have parts of, and clip all of them.

        Returns:
            The global L2 norm before clipping, shape `[]`.
        """
        self.loss_parameters.reduce()
        if self.runtime.parallel_dims.tp_enabled:
            reduce_partial(self.parameters)
        self.scaler.unscale_(self.optimizer)
        return clip_grad_norm(
            self.parameters,
            self.loss_parameters.trained,
            self.max_grad_norm,
            duplicates=self.parts.duplicates,
            pp_mesh=self.runtime.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.runtime.parallel_dims.ep_enabled,
        )

    def forward_backward(self, micro_batches: list[Batch], num_valid_global: Tensor) -> Tensor:
        """Accumulate the gradients of all micro-batches.

        Args:
            micro_batches: this rank's micro-batches.
            num_valid_global: valid elements over all micro-batches and ranks, on the device.

        Returns:
            This rank's part of the loss, shape `[]`.
        """
        device = self.runtime.device
        total = torch.zeros((), device=device)
        if self.parts.schedule is not None:
            # One schedule runs all micro-batches of the step.
            batches = [self.prepare_inputs(batch.to(device)) for batch in micro_batches]
            with self.spmd_context():
                found = self.parts.run_schedule(
                    self.loss_fn, batches, num_valid_global, self.pp_size
                )
            losses = [one.pop("loss") for one in found] or [total]
            self.metrics.add(*found)
            return torch.stack(losses).sum()
        for n, micro_batch in enumerate(micro_batches, start=1):
            if len(micro_batches) > 1:
                last = n == len(micro_batches)
                self.parts.set_requires_gradient_sync(last)  # reduce once per step
            # One at a time: the pixels of a whole step would fill the device.
            batch = self.prepare_inputs(micro_batch.to(device))
            with self.spmd_context():
                output = self.forward(batch)
                loss, metrics = self.loss_fn(output, batch, num_valid_global)
                del output
                with spmd.no_typecheck():
                    self.scaler.scale(loss).backward()
            self.metrics.add(metrics)
            total += loss.detach()
        return total
