"""Deterministic sampling order: a pure function of seed, epoch and index."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ditty_di.data import options
from ditty_di.data.cache import fingerprint

#: Positions whose rows are counted together by `Sampler.rows_before`.
_COUNTED = 1 << 16


def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Return a permutation of `range(rows)`, int64 `[rows]`, the same on every machine.

    It is the sorting order of Philox's raw output. NumPy guarantees that stream, which it does not
    for `Generator.permutation`, and a run must resume under a newer NumPy.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(rows), kind="stable")


class Sampler:
    """A sampler: the endless stream of rows, epoch after epoch, each in its own order.

    Position `g` of the stream is row `epoch(g // rows)[g % rows]`. A subclass may order an epoch in
    another way.

    Args:
        rows: Number of rows of the dataset.
        seed: Seed of the order.
        shuffle: Shuffle each epoch (`permutation`); else rows come as `0, 1, 2, ...`.
    """

    #: Whether each epoch has every row once.
    every_row_once = True

    def __init__(self, rows: int, seed: int, shuffle: bool) -> None:
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self.epoch_rows = rows  # positions after which the next epoch's order begins
        # Two, as a micro-batch may span the end of an epoch.
        self._epoch = lru_cache(maxsize=2)(self.epoch)
        self._counted: tuple[int, np.ndarray] | None = None

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of one epoch in their order, `[rows]`."""
        return permutation(self.seed, number, self.rows) if self.shuffle else np.arange(self.rows)

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order; it is saved with a position."""
        return {"seed": self.seed, "rows": self.rows, "shuffle": self.shuffle}

    def rows_before(self, position: int, ends: Sequence[int]) -> np.ndarray:
        """Return how many rows of each part of the dataset come before a position, int64 `[parts]`.

        They are counted from the last position asked for, or from the epoch's beginning.

        Args:
            position: In the stream.
            ends: Row at which each part ends, ascending; the last is the number of rows.
        """
        epoch = position // self.rows if self.every_row_once else 0
        start, rows = epoch * self.rows, epoch * np.diff(ends, prepend=0)
        if self._counted is not None and start <= self._counted[0] <= position:
            start, rows = self._counted
        while start < position:
            stop = min(position, start + _COUNTED)
            parts = np.searchsorted(ends, self.between(start, stop), side="right")
            start, rows = stop, rows + np.bincount(parts, minlength=len(ends))
        self._counted = position, rows
        return rows

    def between(self, start: int, stop: int) -> list[int]:
        """Return the rows at positions `start` to `stop - 1`; empty when `stop <= start`."""
        found: list[int] = []
        while start < stop:
            rows = self._rows_from(*divmod(start, self.epoch_rows))[: stop - start]
            found += rows.tolist()
            start += len(rows)
        return found

    def _rows_from(self, epoch: int, index: int) -> np.ndarray:
        """Return rows of an epoch from an index on, at least one."""
        rows: np.ndarray = self._epoch(epoch)[index:]
        return rows


class LengthGroupedSampler(Sampler):
    """A sampler that puts rows of similar lengths together, to reduce padding.

    Each `sort_rows` rows of the epoch's shuffled order are sorted by length and cut into groups of
    `group_size` rows. Then the groups of the whole epoch are shuffled; an incomplete one is last.
    With the rows of an optimizer step as `group_size`, the rows of each step have similar lengths,
    and the order is the same on any layout.

    As a partial with `dataset` it is a value of the loader's `sampler`.

    Args:
        rows: Number of rows of the dataset.
        seed: Seed of the order.
        shuffle: Shuffle each epoch.
        dataset: Has `lengths` `[rows]`, in tokens.
        group_size: Rows of a group; None: `sort_rows`.
        sort_rows: Rows that are sorted together, rounded up to whole groups.

    Raises:
        ValueError: A size below 1, another number of lengths than rows, or a mixture with ratios.
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
        options.at_least(1, group_size=group_size, sort_rows=sort_rows)
        options.without_ratios(dataset, "rows grouped by length")
        super().__init__(rows, seed, shuffle)
        self.lengths = np.asarray(dataset.lengths)
        options.require(len(self.lengths) == rows, f"{len(self.lengths)} lengths for {rows} rows")
        self.group_size = sort_rows if group_size is None else group_size
        self.sort_rows = -(-sort_rows // self.group_size) * self.group_size

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of one epoch in their order, `[rows]`."""
        order = super().epoch(number)
        for start in range(0, self.rows, self.sort_rows):
            part = order[start : start + self.sort_rows]
            part[:] = part[np.argsort(-self.lengths[part], kind="stable")]
        groups = self.rows // self.group_size
        if self.shuffle and groups > 1:
            whole = groups * self.group_size
            # Other random numbers than those of the epoch's order.
            shuffled = permutation(self.seed + 1, 2 * number + 1, groups)
            order[:whole] = order[:whole].reshape(groups, self.group_size)[shuffled].reshape(-1)
        return order

    @cached_property
    def _lengths_digest(self) -> str:
        return fingerprint(np.ascontiguousarray(self.lengths, np.int64).tobytes())[:16]

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order; it is saved with a position."""
        grouping = (
            f"groups of {self.group_size} of {self.sort_rows} rows, lengths {self._lengths_digest}"
        )
        return {**super().identity(), "grouping": grouping}
