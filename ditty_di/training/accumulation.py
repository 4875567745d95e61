"""Gradient accumulation: the micro-batches of an optimizer step, and their global token count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import DataloaderExhaustedError

from ditty_di.batch import Batch
from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime
from ditty_di.training.rescue import RankFailedError


class GradientAccumulation:
    """Take the micro-batches of each optimizer step, in step with all ranks.

    One all-reduce per optimizer step, on the CPU and before any backward pass, returns the global
    number of valid elements, whether every rank has all its micro-batches, whether any rank was
    asked to stop or wants a checkpoint, and whether any rank has failed: all ranks raise then, so
    that none waits for one that is gone. With preprocessors, which may reject a micro-batch, there
    are two: the ranks first agree on the micro-batches that are left.

    Args:
        size: micro-batches per rank and optimizer step.
        loss_fn: counts the valid elements of a batch.
        runtime: sums over the ranks.
        prepare: runs the preprocessors; returns None for a rejected batch. None without any.
        count_sources: counts the valid elements of each source in micro-batches, `[sources]`.
        wants_save: returns whether this rank wants a checkpoint after the step that begins.

    Attributes:
        num_valid_of_sources: what it counted in the newest optimizer step, over all ranks.
        taken: micro-batches that the newest optimizer step was taken from.
        rejected: micro-batches of this rank that preprocessors have rejected so far.
        stopping: whether a rank was asked to stop; the same on all ranks.
        saving: whether a rank wants a checkpoint after this step; the same on all ranks.
    """

    def __init__(
        self,
        size: int,
        *,
        loss_fn: Loss,
        runtime: Runtime,
        prepare: Callable[[Batch], Batch | None] | None = None,
        count_sources: Callable[[Sequence[Batch]], Tensor] = lambda batches: torch.zeros(0),
        wants_save: Callable[[], bool] = lambda: False,
    ) -> None:
        self.size, self.loss_fn, self.runtime, self.prepare = size, loss_fn, runtime, prepare
        self.count_sources, self.wants_save = count_sources, wants_save
        self.num_valid_of_sources: list[float] = []
        self.stopping = self.saving = False
        self.taken = self.rejected = 0
        self._failure: Exception | None = None
        # A rank without a single batch takes part in the first reduction too.
        counts = getattr(loss_fn, "num_counts", None)
        self._shape = torch.Size() if counts is None else torch.Size([counts])

    def next_micro_batches(self, data: Iterator[Batch]) -> tuple[list[Batch], Tensor]:
        """Return this rank's next micro-batches and the global number of valid elements.

        Every rank gets the same number of micro-batches: near the end of the data as many as the
        rank with the fewest has, and none that is rejected on any rank.

        Args:
            data: this rank's batches.

        Returns:
            Micro-batches, and the count in float32 on the CPU, shape `[]` or `[parts]`.

        Raises:
            DataloaderExhaustedError: on all ranks, once any of them has no batch left.
            RankFailedError: another rank has failed; that rank raises its own error.
        """
        taken: list[Batch | None] = []
        self.saving = False
        try:
            while self._failure is None and len(taken) < self.size:
                batch = next(data)
                taken.append(self.prepare(batch) if self.prepare else batch)
        except (DataloaderExhaustedError, StopIteration):  # the second from a finished generator
            pass
        except Exception as error:
            self.fail(error)
        self.taken = len(taken)
        rejected = [float(batch is None) for batch in taken] + [0.0] * (self.size - len(taken))
        micro_batches = [batch for batch in taken if batch is not None]
        short, *more = self._agree(
            len(taken) < self.size, *(rejected if self.prepare else self._count(micro_batches))
        )
        if short or self.prepare:
            common = self.size
            if short:
                ranks_with = self.runtime.sum([len(taken) == n for n in range(self.size + 1)])
                common = [ranks > 0 for ranks in ranks_with].index(True)
            if common == 0:
                raise DataloaderExhaustedError
            rejected = more if self.prepare else rejected
            kept = zip(taken[:common], rejected, strict=False)
            micro_batches = [batch for batch, on_any_rank in kept if batch and not on_any_rank]
            self.rejected += common - len(micro_batches)
            more = self._agree(*self._count(micro_batches))
        parts = self._shape.numel()
        self.num_valid_of_sources = more[parts:]
        return micro_batches, torch.tensor(more[:parts], dtype=torch.float32).reshape(self._shape)

    def stop(self) -> None:
        """Take no further optimizer step; called on all ranks."""
        self.stopping = True

    def fail(self, error: Exception) -> None:
        """Raise an error with the next reduction on all ranks, or at once on a single one.

        Args:
            error: what failed on this rank.
        """
        if self.runtime.world_size == 1:
            raise error
        self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Reduce once more after the last step, to raise on all ranks if one has failed."""
        if self.runtime.world_size > 1:
            self._agree()

    def get_metrics(self) -> dict[str, float]:
        """Return `rejected_batches` of this rank, or {} without preprocessors."""
        return {"rejected_batches": float(self.rejected)} if self.prepare else {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint saves."""
        return {"rejected": self.rejected}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rejected = state_dict["rejected"]

    def _agree(self, *values: float) -> list[float]:
        """Return values summed over the ranks; raise on all of them if one has failed."""
        flags = [self._failure is not None, self.runtime.stop_requested(), self.wants_save()]
        failed, stopping, saving, *summed = self.runtime.sum([*flags, *values])
        if failed:
            raise self._failure or RankFailedError("another rank failed")
        self.stopping = self.stopping or stopping > 0
        self.saving = self.saving or saving > 0
        return summed

    def _count(self, micro_batches: list[Batch]) -> list[float]:
        """Return what is counted in the micro-batches, of sources last; zeros after a failure."""
        if micro_batches and self._failure is None:
            try:
                of_batches = [self.loss_fn.num_valid(batch) for batch in micro_batches]
                for batch, num_valid in zip(micro_batches, of_batches, strict=True):
                    batch.num_valid = num_valid
                counts = torch.stack(of_batches).sum(0)
                self._shape = counts.shape
                of_sources = self.count_sources(micro_batches).to(counts.device)
                return torch.cat([counts.flatten().double(), of_sources]).tolist()
            except Exception as error:
                self.fail(error)
        return [0.0] * (self._shape.numel() + len(self.count_sources([])))
