"""One optimizer step's micro-batches, and how much they weigh over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchtitan.components.dataloader import DataloaderExhaustedError

if TYPE_CHECKING:
    from ditty_di.protocols import Batch, Loss
    from ditty_di.runtime import Runtime


class Windows:
    """Takes windows of up to `size` micro-batches from a rank's data, in step with all ranks.

    One reduction a window says how much its batches weigh over all ranks, whether every rank has
    a full window, and whether any rank was asked to stop (`stopping`, true on all ranks alike).
    It runs on the CPU, before any backward pass.
    """

    def __init__(self, size: int, *, loss_fn: Loss, runtime: Runtime) -> None:
        self.size, self.loss_fn, self.runtime = size, loss_fn, runtime
        self.stopping = False
        self._shape = torch.Size()

    def take(self, data: Iterator[Batch]) -> tuple[list[Batch], Tensor]:
        """This rank's micro-batches, and the global counts (float32, on the CPU).

        Every rank gets the same number of micro-batches: near the end of the data, as many as the
        poorest rank has.

        Raises:
            DataloaderExhaustedError: on all ranks, once any of them has no batch left.
        """
        window: list[Batch] = []
        try:
            while len(window) < self.size:
                window.append(next(data))
        except (DataloaderExhaustedError, StopIteration):  # the second from a spent generator
            pass
        stop, short, *total = self.runtime.sum(
            [self.runtime.stop_requested(), len(window) < self.size, *self._weigh(window)]
        )
        self.stopping = stop > 0
        if short:
            ranks_with = self.runtime.sum([len(window) == n for n in range(self.size + 1)])
            common = [ranks > 0 for ranks in ranks_with].index(True)
            if common == 0:
                raise DataloaderExhaustedError
            window = window[:common]
            total = self.runtime.sum(self._weigh(window))
        return window, torch.tensor(total, dtype=torch.float32).reshape(self._shape)

    def _weigh(self, window: list[Batch]) -> list[float]:
        if not window:
            return [0.0] * self._shape.numel()
        counts = torch.stack([self.loss_fn.count(batch) for batch in window]).sum(0)
        self._shape = counts.shape
        return counts.flatten().tolist()
