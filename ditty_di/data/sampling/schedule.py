"""Which source each row comes from: within one row of the ratios at any prefix."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from ditty_di.data import options

#: Ratios that repeat only after more rows are refused.
LONGEST_PERIOD = 1 << 20


def period_of(ratios: Mapping[str, float | str]) -> dict[str, int]:
    """Return how many rows of each source come in the shortest period that has the exact ratios.

    Decimals are read as they are written: 0.7, 0.2 and 0.1 are 7, 2 and 1. They need not sum to 1.

    Raises:
        ValueError: A negative ratio, none above 0, or a period of more than `LONGEST_PERIOD` rows.
    """
    parts = {name: Fraction(str(ratio)) for name, ratio in ratios.items()}
    negative = [name for name, part in parts.items() if part < 0]
    options.require(not negative, f"ratios={dict(ratios)}: {', '.join(negative)} is below 0")
    whole = sum(parts.values())
    options.require(whole > 0, f"ratios={dict(ratios)}: one must be above 0")
    shares = [part / whole for part in parts.values()]
    length = int(np.lcm.reduce([share.denominator for share in shares], dtype=object))
    options.require(
        length <= LONGEST_PERIOD,
        f"ratios={dict(ratios)} repeat after {length} rows, more than {LONGEST_PERIOD}: round them",
    )
    return {name: int(share * length) for name, share in zip(parts, shares, strict=True)}


def chairman_assignment(counts: Sequence[int]) -> np.ndarray:
    """Return the source of each row of one period, int64 `[sum(counts)]`.

    This is Tijdeman's assignment (The chairman assignment problem, 1980): at each prefix each of m
    sources has had its ideal number of rows, to less than one row. The k-th of a source's n rows of
    a period of L may come from the first t with `n t >= L (k - 1 + 1 / (2 m - 2))`, and must by the
    last t with `n t <= L (k - 1 / (2 m - 2))`. Of those that may come the one that must first does.

    Args:
        counts: Rows of each source in a period.
    """
    present = [(source, n) for source, n in enumerate(counts) if n]
    length = sum(n for _, n in present)
    if len(present) == 1:
        return np.full(length, present[0][0])
    scale = 2 * len(present) - 2  # all times this, so that everything is whole
    jobs: list[tuple[int, int, int]] = []
    for source, n in present:
        k = np.arange(1, n + 1)
        earliest = -(-(length * (scale * (k - 1) + 1)) // (n * scale))
        latest = (length * (scale * k - 1)) // (n * scale)
        jobs += zip(earliest.tolist(), latest.tolist(), [source] * n, strict=True)
    jobs.sort()
    waiting: list[tuple[int, int]] = []  # latest position and source
    order, taken = np.empty(length, np.int64), 0
    for t in range(1, length + 1):
        while taken < length and jobs[taken][0] <= t:
            heapq.heappush(waiting, jobs[taken][1:])
            taken += 1
        order[t - 1] = heapq.heappop(waiting)[1]
    return order


class Stage:
    """The endless repetition of one period.

    Args:
        ratios: Ratio of each source.

    Attributes:
        counts: Rows of each source in a period, `[sources]`.
        length: Rows of a period.
    """

    def __init__(self, ratios: Mapping[str, float | str]) -> None:
        self.counts = np.array([*period_of(ratios).values()], np.int64)
        self.order = chairman_assignment(self.counts.tolist())
        self.length = len(self.order)
        self._before = np.empty(self.length, np.int64)  # rows of the same source before, in it
        for source, n in enumerate(self.counts):
            self._before[self.order == source] = np.arange(n)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source and row of the source at each position, both int64 `[positions]`."""
        turn, index = np.divmod(positions, self.length)
        source = self.order[index]
        return source, turn * self.counts[source] + self._before[index]

    def rows_before(self, position: int) -> np.ndarray:
        """Return how many rows of each source come before a position, `[sources]`."""
        turn, index = divmod(position, self.length)
        return turn * self.counts + np.bincount(self.order[:index], minlength=len(self.counts))


class Schedule:
    """Source and row of the source at any position of an endless stream, without a loop to it.

    Args:
        stages: Ratios of each source from a row on, by its position; the first is 0. A stage ends
            with a whole period of its ratios, so the next one begins up to a period later.

    Raises:
        ValueError: Stages that do not begin at 0 or have other sources, or ratios that
            `period_of` refuses.
    """

    def __init__(self, stages: Mapping[int, Mapping[str, float | str]]) -> None:
        begins = sorted(stages)
        options.require(begins[:1] == [0], f"the first stage is at {begins[:1]}, not 0")
        self.names = [*stages[0]]
        other = [begin for begin in begins if {*stages[begin]} != {*self.names}]
        options.require(not other, f"the stages at {other} have other sources than {self.names}")
        self.stages = [Stage({name: stages[at][name] for name in self.names}) for at in begins]
        self.begins = [0]
        self._rows = [np.zeros(len(self.names), np.int64)]  # of each source, before each stage
        for stage, wanted in zip(self.stages[:-1], begins[1:], strict=True):
            rows = -(-max(0, wanted - self.begins[-1]) // stage.length) * stage.length
            self._rows.append(self._rows[-1] + stage.rows_before(rows))
            self.begins.append(self.begins[-1] + rows)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source and row of the source at each position, both int64 `[positions]`."""
        number = np.searchsorted(self.begins, positions, side="right") - 1
        source, row = np.empty_like(number), np.empty_like(number)
        for n in np.unique(number):
            here = number == n
            source[here], row[here] = self.stages[n].at(positions[here] - self.begins[n])
            row[here] += self._rows[n][source[here]]
        return source, row

    def rows_before(self, position: int) -> dict[str, int]:
        """Return how many rows of each source come before a position."""
        n = int(np.searchsorted(self.begins, position, side="right")) - 1
        rows = self._rows[n] + self.stages[n].rows_before(position - self.begins[n])
        return dict(zip(self.names, rows.tolist(), strict=True))
