"""One optimizer step's micro-batches, and how much they weigh over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import DataloaderExhaustedError

from ditty_di.rescue import RankFailedError

if TYPE_CHECKING:
    from ditty_di.protocols import Batch, Loss
    from ditty_di.runtime import Runtime


class Windows:
    """Takes windows of up to `size` micro-batches from a rank's data, in step with all ranks.

    One reduction a window says how much its batches weigh over all ranks, whether every rank has
    a full window, and whether any rank was asked to stop (`stopping`, true on all ranks alike).
    It runs on the CPU, before any backward pass. With `prepare` (preprocessors, which may reject a
    micro-batch by returning None) there are two: first the ranks agree on what is left. `taken` is
    how many micro-batches the last window was taken from, `rejected` how many were in all.

    The reduction also tells whether a rank has failed, in its data or before (`failure`): all ranks
    raise then, so that none waits for one that is gone.
    """

    def __init__(
        self,
        size: int,
        *,
        loss_fn: Loss,
        runtime: Runtime,
        prepare: Callable[[Batch], Batch | None] | None = None,
    ) -> None:
        self.size, self.loss_fn, self.runtime, self.prepare = size, loss_fn, runtime, prepare
        self.stopping = False
        self.failure: Exception | None = None
        self.taken = self.rejected = 0
        # A rank without a single batch takes part in the first reduction too.
        parts = getattr(loss_fn, "counts", None)  # of a composite
        self._shape = torch.Size() if parts is None else torch.Size([parts])

    def take(self, data: Iterator[Batch]) -> tuple[list[Batch], Tensor]:
        """This rank's micro-batches, and the global counts (float32, on the CPU).

        Every rank gets the same number of micro-batches: near the end of the data, as many as the
        poorest rank has, and none that `prepare` rejects on any rank.

        Raises:
            DataloaderExhaustedError: on all ranks, once any of them has no batch left.
            RankFailedError: another rank has failed; on that one its own error is raised.
        """
        taken: list[Batch | None] = []
        try:
            while self.failure is None and len(taken) < self.size:
                batch = next(data)
                taken.append(self.prepare(batch) if self.prepare else batch)
        except (DataloaderExhaustedError, StopIteration):  # the second from a spent generator
            pass
        except Exception as error:
            self.fail(error)
        self.taken = len(taken)
        absent = [float(batch is None) for batch in taken] + [0.0] * (self.size - len(taken))
        window = [batch for batch in taken if batch is not None]
        weights = absent if self.prepare else self._weigh(window)
        failed, stop, short, *more = self.runtime.sum(
            [
                self.failure is not None,
                self.runtime.stop_requested(),
                len(taken) < self.size,
                *weights,
            ]
        )
        self._raise_if(failed)
        self.stopping = stop > 0
        common = self.size
        if short:
            ranks_with = self.runtime.sum([len(taken) == n for n in range(self.size + 1)])
            common = [ranks > 0 for ranks in ranks_with].index(True)
            if common == 0:
                raise DataloaderExhaustedError
        if short or self.prepare:
            rejected = more if self.prepare else absent
            window = [b for b, no in zip(taken[:common], rejected, strict=False) if b and not no]
            self.rejected += common - len(window)
            weights = self._weigh(window)
            failed, *more = self.runtime.sum([self.failure is not None, *weights])
            self._raise_if(failed)
        return window, torch.tensor(more, dtype=torch.float32).reshape(self._shape)

    def fail(self, error: Exception) -> None:
        """Raise the error with the next reduction, on all ranks; on a single one at once."""
        if self.runtime.world_size == 1:
            raise error
        self.failure = self.failure or error

    def raise_failure(self) -> None:
        """Reduce once more after the last window, to raise on all ranks if one has failed."""
        if self.runtime.world_size > 1:
            self._raise_if(self.runtime.sum([self.failure is not None])[0])

    def _raise_if(self, failed: float) -> None:
        if failed:
            raise self.failure or RankFailedError("another rank failed")

    def get_metrics(self) -> dict[str, float]:
        """`rejected_batches`: micro-batches of a rank until now, where something may reject one."""
        return {"rejected_batches": float(self.rejected)} if self.prepare else {}

    def state_dict(self) -> dict[str, Any]:
        return {"rejected": self.rejected}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rejected = state_dict["rejected"]

    def _weigh(self, window: list[Batch]) -> list[float]:
        if not window or self.failure is not None:
            return [0.0] * self._shape.numel()
        try:
            counts = torch.stack([self.loss_fn.count(batch) for batch in window]).sum(0)
        except Exception as error:
            self.fail(error)
            return [0.0] * self._shape.numel()
        self._shape = counts.shape
        return counts.flatten().tolist()
