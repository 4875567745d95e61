"""Which dataset row comes when: a pure function of seed, epoch and place in the epoch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of `range(rows)`, int64 `[rows]`, the same on every machine.

    The sorting order of Philox's raw output: NumPy promises that stream for ever, which it does
    not for `Generator.permutation`, and a run must resume under a newer NumPy.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(rows), kind="stable")


class Order:
    """The endless stream of rows: epoch follows epoch, each in its own order.

    Place `g` of the stream is `permutation(seed, g // rows)[g % rows]`, or `g % rows` without
    shuffling.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool) -> None:
        def epoch(number: int) -> np.ndarray:
            return permutation(seed, number, rows) if shuffle else np.arange(rows)

        self._rows = rows
        # Two, as a micro-batch may straddle epochs.
        self._epoch = lru_cache(maxsize=2)(epoch)

    def between(self, start: int, stop: int) -> list[int]:
        """The dataset rows at places `start` to `stop - 1`; empty when `stop <= start`."""
        found: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self._rows)
            last = min(self._rows, first + stop - start)
            found += self._epoch(epoch)[first:last].tolist()
            start += last - first
        return found
