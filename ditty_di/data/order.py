"""Which dataset row comes when: a pure function of seed, epoch and place in the epoch."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ditty_di.data.cache import fingerprint


def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of `range(rows)`, int64 `[rows]`, the same on every machine.

    The sorting order of Philox's raw output: NumPy promises that stream for ever, which it does
    not for `Generator.permutation`, and a run must resume under a newer NumPy.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(rows), kind="stable")


class Order:
    """The endless stream of rows: epoch follows epoch, each in its own order.

    Place `g` of the stream is `epoch(g // rows)[g % rows]`: `permutation(seed, epoch, rows)`, or
    `0, 1, 2, ...` without shuffling. A subclass may order an epoch in another way.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool) -> None:
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        # Two, as a micro-batch may straddle epochs.
        self._epoch = lru_cache(maxsize=2)(self.epoch)

    def epoch(self, number: int) -> np.ndarray:
        """The rows of one epoch in their order, `[rows]`."""
        return permutation(self.seed, number, self.rows) if self.shuffle else np.arange(self.rows)

    def identity(self) -> dict[str, Any]:
        """What decides about the order; a position in it is saved with this."""
        return {"seed": self.seed, "rows": self.rows, "shuffle": self.shuffle}

    def between(self, start: int, stop: int) -> list[int]:
        """The dataset rows at places `start` to `stop - 1`; empty when `stop <= start`."""
        found: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.rows)
            last = min(self.rows, first + stop - start)
            found += self._epoch(epoch)[first:last].tolist()
            start += last - first
        return found


class LengthGrouped(Order):
    """Rows of similar lengths come together, so that there is little padding.

    Each `sort_rows` rows of the epoch's shuffled order are sorted by length and cut into groups of
    `group_size` rows; then the groups of the whole epoch are shuffled, an incomplete one staying
    last. With the rows of an optimizer step as `group_size`, steps are of one length each, and
    the order is the same on any layout. `group_size=None` is `sort_rows`.

    As a partial with `dataset`, whose `lengths` `[rows]` it takes, it fits the loader's `order`.

    Raises `ValueError` for sizes below 1, or other than one length a row.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        shuffle: bool,
        *,
        dataset: Any,
        group_size: int | None = None,
        sort_rows: int = 1024,
    ) -> None:
        group_size = sort_rows if group_size is None else group_size
        if group_size < 1 or sort_rows < 1:
            raise ValueError(f"group_size={group_size}, sort_rows={sort_rows}: at least 1 each")
        super().__init__(rows, seed, shuffle)
        self.lengths = np.asarray(dataset.lengths)
        if len(self.lengths) != rows:
            raise ValueError(f"{len(self.lengths)} lengths for {rows} rows")
        self.group_size = group_size
        self.sort_rows = -(-sort_rows // group_size) * group_size

    def epoch(self, number: int) -> np.ndarray:
        order = super().epoch(number)
        for start in range(0, self.rows, self.sort_rows):
            part = order[start : start + self.sort_rows]
            order[start : start + self.sort_rows] = part[
                np.argsort(-self.lengths[part], kind="stable")
            ]
        groups = self.rows // self.group_size
        if self.shuffle and groups > 1:
            whole = groups * self.group_size
            # Not the draws that made the epoch's order.
            places = permutation(self.seed + 1, 2 * number + 1, groups)
            order[:whole] = order[:whole].reshape(groups, self.group_size)[places].reshape(-1)
        return order

    @cached_property
    def _lengths_digest(self) -> str:
        return fingerprint(np.ascontiguousarray(self.lengths, np.int64).tobytes())[:16]

    def identity(self) -> dict[str, Any]:
        grouping = (
            f"groups of {self.group_size} of {self.sort_rows} rows, lengths {self._lengths_digest}"
        )
        return {**super().identity(), "grouping": grouping}
