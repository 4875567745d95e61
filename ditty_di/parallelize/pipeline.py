"""The model as one rank trains it, and pipeline parallelism on every torch version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditty_di.batch import Batch
from ditty_di.compat import PIPELINE_TAKES_MICROBATCHES
from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime, seed_everything
from ditty_di.seed import preserved_rng


class PipelineLoss:
    """The loss function of a pipeline schedule, called with an output and a micro-batch number.

    Schedules take tensors as targets, those of older torch versions split them, and they cannot
    pass the global count to the loss: so batches and count are kept here.

    Args:
        loss_fn: the training loss.
        finish: `Processors.finish`, which runs the postprocessors.
    """

    def __init__(self, loss_fn: Loss, finish: Callable[[Any, Batch, Loss], Any]) -> None:
        self.loss_fn, self.finish = loss_fn, finish
        self.batches: list[Batch] = []
        self.metrics: dict[int, dict[str, Tensor]] = {}
        self.num_valid_global: Tensor | None = None

    def begin(self, batches: list[Batch], num_valid_global: Tensor) -> None:
        """Start an optimizer step.

        Args:
            batches: its micro-batches.
            num_valid_global: what the loss counted over the step.
        """
        self.batches, self.metrics, self.num_valid_global = batches, {}, num_valid_global

    def __call__(self, output: Any, number: Tensor, **ignored: Any) -> Tensor:
        """Return the loss of a micro-batch, shape `[]`."""
        assert self.num_valid_global is not None
        n = int(number)
        if n >= len(self.batches):  # pads a step with fewer micro-batches
            tensors = [x for x in tree_leaves(output) if torch.is_tensor(x) and x.requires_grad]
            return torch.stack([0.0 * x.sum() for x in tensors]).sum()
        batch = self.batches[n]
        output = self.finish(output, batch, self.loss_fn)
        loss, metrics = self.loss_fn(output, batch, self.num_valid_global)
        # The last call counts: before the first step a schedule may run one to infer shapes.
        self.metrics[n] = metrics
        return loss


@dataclass
class ModelParts:
    """The model as this rank trains it: one module, or its pipeline stages.

    Args:
        modules: the module, or this rank's stages.
        schedule: pipeline schedule; None without pipeline parallelism.
        pipeline_loss: the loss that the schedule calls.
        has_first_stage: whether this rank has the first stage.
        has_last_stage: whether this rank has the last stage, and so the loss.
    """

    modules: list[nn.Module]
    schedule: Any = None
    pipeline_loss: PipelineLoss | None = None
    has_first_stage: bool = True
    has_last_stage: bool = True

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all modules."""
        return [p for module in self.modules for p in module.parameters()]

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Return the output of the model.

        Args:
            inputs: its arguments on the device; `"input"` is the positional one.
        """
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
        self, batches: list[Batch], num_valid_global: Tensor, size: int
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Run forward and backward of an optimizer step's micro-batches.

        Args:
            batches: the micro-batches on the device.
            num_valid_global: what the loss counted over the step.
            size: number of micro-batches of the schedule. Fewer are padded with the first one,
                whose loss is then 0.

        Returns:
            The loss, shape `[]`, and each micro-batch's metrics on the rank of the last stage; 0
            and nothing on the others.
        """
        assert self.pipeline_loss is not None
        self.pipeline_loss.begin(batches, num_valid_global)
        padded = [batch.inputs for batch in batches + batches[:1] * (size - len(batches))]
        inputs = [one["input"] for one in padded]
        keywords = [{k: v for k, v in one.items() if k != "input"} for one in padded]
        numbers = torch.arange(size)
        losses: list[Tensor] | None = [] if self.has_last_stage else None
        if PIPELINE_TAKES_MICROBATCHES:
            self.schedule.step(
                arg_mbs=[(x,) for x in inputs] if self.has_first_stage else None,
                kwarg_mbs=keywords,
                target_mbs=list(numbers.split(1)) if self.has_last_stage else None,
                losses=losses,
                return_outputs=False,
            )
        else:
            # The schedule splits the concatenated step again, into the same micro-batches.
            self.schedule.step(
                *([torch.cat(inputs)] if self.has_first_stage else []),
                target=numbers if self.has_last_stage else None,
                losses=losses,
                return_outputs=False,
                **{key: torch.cat([k[key] for k in keywords]) for key in keywords[0]},
            )
        if losses is None:
            return torch.zeros_like(num_valid_global.sum()), []
        total = torch.stack([loss.detach() for loss in losses]).sum()
        return total.to(num_valid_global.device), list(self.pipeline_loss.metrics.values())


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
