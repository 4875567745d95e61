"""The model as one rank trains it, and pipeline parallelism on every torch version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditty_di.batch import Batch
from ditty_di.compat import run_micro_batches
from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime, gathered, seed_everything
from ditty_di.seed import preserved_rng


class PipelineLoss:
    """The loss function of a pipeline schedule, called with an output and a micro-batch number.

    Schedules take tensors as targets, and cannot pass the global count to the loss: so loss,
    batches and count are kept here.

    Args:
        finish: `Processors.finish`, which runs the postprocessors.
    """

    def __init__(self, finish: Callable[[Any, Batch, Loss], Any]) -> None:
        self.finish = finish
        self.loss_fn: Loss | None = None
        self.batches: list[Batch] = []
        self.metrics: dict[int, dict[str, Tensor]] = {}
        self.of_stages: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.num_valid_global: Tensor | None = None

    def begin(self, loss_fn: Loss, batches: list[Batch], num_valid_global: Tensor) -> None:
        """Start an optimizer step, or a part of a validation.

        Args:
            loss_fn: its loss.
            batches: its micro-batches.
            num_valid_global: what the loss counted over all of it.
        """
        self.loss_fn, self.batches, self.metrics, self.of_stages = loss_fn, batches, {}, {}
        self.num_valid_global = num_valid_global

    def __call__(self, output: Any, number: Tensor, **ignored: Any) -> Tensor:
        """Return the loss of a micro-batch, shape `[]`."""
        assert self.loss_fn is not None and self.num_valid_global is not None
        n = int(number)
        if n >= len(self.batches):  # pads a step with fewer micro-batches
            leaves = tree_leaves(output)
            tensors = [x for x in leaves if torch.is_tensor(x) and x.is_floating_point()]
            return torch.stack([0.0 * x.sum() for x in tensors]).sum()
        batch = self.batches[n]
        output = self.finish(output, batch, self.loss_fn)
        loss, metrics = self.loss_fn(output, batch, self.num_valid_global)
        # The last call counts: before the first step a schedule may run one to infer shapes.
        self.metrics[n] = metrics
        return loss

    def stage_part(self, stage: int, number: int) -> Tensor | None:
        """Return the part of the loss of a stage before the last one, shape `[]`; None without.

        Args:
            stage: what tells it from others of this rank.
            number: of the micro-batch that it ran last.
        """
        of_stage = getattr(self.loss_fn, "of_stage", None)
        if of_stage is None or number >= len(self.batches):
            return None
        if (found := of_stage(self.batches[number], self.num_valid_global)) is None:
            return None
        loss: Tensor = found[0]
        self.of_stages[stage, number] = {**found[1], "loss": loss.detach()}
        return loss

    def found(self, losses: list[Tensor] | None) -> list[dict[str, Tensor]]:
        """Return `loss` and metrics of each micro-batch, as far as this rank's stages have them.

        Args:
            losses: of the last stage; None without it.
        """
        last = (losses or [])[: len(self.batches)]
        found = [{**self.metrics[n], "loss": loss} for n, loss in enumerate(last)]
        if not found and self.of_stages:
            found = [{} for _ in self.batches]
        for (_, number), values in self.of_stages.items():
            found[number] = add_up(found[number], values)
        return found


class WithLoss(torch.autograd.Function):
    """Hidden states whose backward pass is also that of a part of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        """Return a copy of the hidden states."""
        return hidden.clone()  # a view could not be detached in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of the hidden states, and that of the loss."""
        return gradient, torch.ones((), device=gradient.device)


def add_up(*values: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of values by name; a name that others lack counts as 0 there."""
    total: dict[str, Any] = {}
    for one in values:
        total |= {name: total[name] + v if name in total else v for name, v in one.items()}
    return total


class TorchSchedule:
    """A pipeline schedule of torch's, with the interface of `StageSchedule`.

    Args:
        schedule: made by a function of the user's; its number of micro-batches is fixed.
        has_first_stage: whether this rank has the first stage.
        has_last_stage: whether this rank has the last stage.
    """

    duplicates: Sequence[nn.Parameter] = ()

    def __init__(self, schedule: Any, *, has_first_stage: bool, has_last_stage: bool) -> None:
        self.schedule = schedule
        self.has_first_stage, self.has_last_stage = has_first_stage, has_last_stage

    def run(self, inputs: list[dict[str, Any]], *, backward: bool) -> list[Tensor] | None:
        """Run micro-batches; see `StageSchedule.run`."""
        ends = {"first": self.has_first_stage, "last": self.has_last_stage}
        return run_micro_batches(self.schedule, inputs, backward=backward, **ends)


@dataclass
class ModelParts:
    """The model as this rank trains it: one module, or its pipeline stages.

    Args:
        modules: the module, or this rank's stages.
        schedule: `StageSchedule` or `TorchSchedule`; None without pipeline parallelism.
        pipeline_loss: the loss that the schedule calls.
        whole: the model before it was split, on meta; None without pipeline parallelism.
        group: the ranks of the pipeline.
    """

    modules: list[nn.Module]
    schedule: Any = None
    pipeline_loss: PipelineLoss | None = None
    whole: nn.Module | None = None
    group: dist.ProcessGroup | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all modules."""
        return [p for module in self.modules for p in module.parameters()]

    @property
    def duplicates(self) -> Sequence[nn.Parameter]:
        """Parameters that another pipeline rank has as well, and counts in the gradient norm."""
        return self.schedule.duplicates if self.schedule is not None else ()

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Return the output of the model.

        Args:
            inputs: its arguments on the device; `"input"` is the positional one.

        Raises:
            ValueError: the model is split into pipeline stages.
        """
        if self.schedule is not None:
            raise ValueError(
                "forward: the model is split into pipeline stages (runtime.pp > 1), and no rank "
                "has its output; take the loss of a validator, or task=generate run=FOLDER"
            )
        keywords = {name: value for name, value in inputs.items() if name != "input"}
        return self.modules[0](inputs["input"], **keywords)

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Set whether the next backward pass reduces gradients over the data-parallel ranks.

        Args:
            requires_gradient_sync: as in `torch.distributed.fsdp.FSDPModule`.
        """
        for module in self.modules:
            set_sync: Any = getattr(module, "set_requires_gradient_sync", None)
            if set_sync is not None:
                set_sync(requires_gradient_sync)

    def run_schedule(
        self,
        loss_fn: Loss,
        batches: list[Batch],
        num_valid_global: Tensor,
        size: int,
        *,
        backward: bool = True,
    ) -> list[dict[str, Tensor]]:
        """Run an optimizer step's micro-batches through the stages.

        Args:
            loss_fn: the loss.
            batches: the micro-batches on the device.
            num_valid_global: what the loss counted over the step.
            size: number of micro-batches of the schedule. Fewer are padded with the first one,
                whose loss is then 0.
            backward: whether gradients are accumulated.

        Returns:
            `loss` and metrics of each micro-batch on the rank of the last stage; on the others what
            their stages have of them (`Loss.of_stage`), or nothing.
        """
        assert self.pipeline_loss is not None
        self.pipeline_loss.begin(loss_fn, batches, num_valid_global)
        padded = [batch.inputs for batch in batches + batches[:1] * (size - len(batches))]
        losses = self.schedule.run(padded, backward=backward)
        device = num_valid_global.device
        losses = losses and [loss.detach().to(device) for loss in losses]
        return self.pipeline_loss.found(losses)

    def evaluate(
        self, loss_fn: Loss, batches: list[Batch], num_valid_global: Tensor, size: int
    ) -> list[dict[str, Tensor]]:
        """Run micro-batches through the stages without gradients.

        Args:
            loss_fn: the loss.
            batches: at most `size` micro-batches on the device.
            num_valid_global: what the loss counted over all data.
            size: as in `run_schedule`.

        Returns:
            `loss` and metrics of each micro-batch, on the CPU, on all ranks of the pipeline.
        """
        own = self.run_schedule(loss_fn, batches, num_valid_global, size, backward=False)
        shown = [{name: value.detach().cpu() for name, value in one.items()} for one in own]
        found = filter(None, gathered(shown, self.group))
        return [add_up(*of_ranks) for of_ranks in zip(*found, strict=True)]


class SyncedPPRNG:
    """Use the same random numbers on all pipeline stages while preprocessors run.

    Otherwise each stage has its own: the first would get the input that a preprocessor made, and
    the last the target that it made with other noise. Numbers differ between steps, micro-batches
    and data-parallel ranks; the generators of the training are restored afterwards.

    Args:
        runtime: seed, device and data-parallel rank.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._step = self._number = 0

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Seed the generators for the next micro-batch of an optimizer step.

        Args:
            step: optimizer step.
        """
        self._number = self._number + 1 if step == self._step else 0
        self._step = step
        runtime = self.runtime
        words = [runtime.seed % 2**32, runtime.dp_rank, step, self._number]
        with preserved_rng(runtime.device):
            seed_everything(int(np.random.SeedSequence(words).generate_state(1)[0]))
            yield
