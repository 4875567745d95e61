"""Forward passes of any layout: of one batch, of any inputs, and of many batches for their loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import Tensor

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils

from ditty_di.batch import Batch
from ditty_di.parallelize.collectives import gather_output
from ditty_di.parallelize.context import SequenceSplit
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.processors import Processors
from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime


class ForwardPass:
    """Run the model as this rank trains it.

    Args:
        parts: the model, or its pipeline stages.
        loss_fn: see `ditty_di.protocols.Loss`.
        runtime: device and layout.
        processors: its postprocessors run between model and loss.
        pp_size: micro-batches of the pipeline schedule.

    Attributes:
        split: how sequences are split over ranks; None if they are not.
    """

    def __init__(
        self,
        *,
        parts: ModelParts,
        loss_fn: Loss,
        runtime: Runtime,
        processors: Processors | None = None,
        pp_size: int = 1,
    ) -> None:
        self.parts, self.loss_fn, self.runtime = parts, loss_fn, runtime
        self.processors, self.pp_size = processors or Processors(), pp_size
        self.split = SequenceSplit.of(parts.modules)
        self.spmd_context = dist_utils.get_spmd_context(parallel_dims=runtime.parallel_dims)

    def own_part(self, batch: Batch) -> Batch:
        """Return this rank's part of the sequences of a batch, where they are split.

        Args:
            batch: whole rows, after the preprocessors.
        """
        if self.split is None:
            return batch
        return self.split.cut(batch, ignore_index=getattr(self.loss_fn, "ignore_index", -100))

    def forward(self, batch: Batch) -> Any:
        """Return the model's output after the postprocessors.

        Args:
            batch: this rank's part of a batch, on the device.
        """
        with self.spmd_context():
            output = self.parts.forward(batch.inputs)
        return self.processors.finish(output, batch, self.loss_fn)

    def run_model(self, inputs: dict[str, Any]) -> Any:
        """Return the model's output for whole rows, whole on every rank.

        Args:
            inputs: its arguments on any device; `"input"` is the positional one.
        """
        batch = Batch(inputs, None).to(self.runtime.device)
        with self.spmd_context():
            output = gather_output(self.parts.forward(self.own_part(batch).inputs))
        return output if self.split is None else self.split.join(output, inputs["input"].shape[1])

    def evaluate(
        self, loss_fn: Loss, batches: Iterable[Batch], num_valid_global: Tensor
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the loss and the metrics of each batch; all ranks that share a batch get the same.

        Args:
            loss_fn: the loss; it may report more than the training's, such as losses by source.
            batches: whole rows on the device, after the preprocessors. With pipeline stages
                `pp_size` of them are taken at a time.
            num_valid_global: valid elements of all batches and ranks, on the device.

        Yields:
            `loss` and metrics by name.
        """
        for found in self._losses(loss_fn, map(self.own_part, batches), num_valid_global):
            yield {name: self._of_whole_rows(value) for name, value in found.items()}

    def _of_whole_rows(self, value: Tensor) -> Tensor:
        """Return a sum over the tokens of whole rows, for that of this rank's parts."""
        if self.split is None:
            return value
        total = value.detach().to(self.runtime.device, copy=True)
        dist.all_reduce(total, group=self.split.mesh.get_group())
        return total

    def _losses(
        self, loss_fn: Loss, batches: Iterator[Batch], num_valid_global: Tensor
    ) -> Iterator[dict[str, Tensor]]:
        """Yield loss and metrics of this rank's parts of batches, with its group of stages."""
        if self.parts.schedule is None:
            for batch in batches:
                loss, metrics = loss_fn(self.forward(batch), batch, num_valid_global)
                yield {**metrics, "loss": loss}
            return
        while several := list(islice(batches, self.pp_size)):
            with self.spmd_context():
                found = self.parts.evaluate(loss_fn, several, num_valid_global, self.pp_size)
            yield from found
