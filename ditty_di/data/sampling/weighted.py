"""Rows drawn with given weights, the same on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ditty_di.data import options
from ditty_di.data.cache import fingerprint
from ditty_di.data.sampling.sampler import Sampler

#: Third word of the seeds, so that the numbers are others than those of `permutation`.
_PURPOSE = 1
_TERMS = 12


class WeightedSampler(Sampler):
    """A sampler that draws rows with probabilities proportional to their weights.

    With replacement each draw is independent of the others: a row may come again at once, and
    another one never. Without replacement the stream consists of rounds of `num_samples` draws, and
    no row comes twice in a round: the next row is drawn from those left, in proportion to their
    weights (Efraimidis and Spirakis, 2006, Weighted random sampling with a reservoir). An epoch of
    the loader is as many draws as the dataset has rows. Rows of weight 0 never come.

    As a partial with `weights` it is a value of the loader's `sampler`.

    Args:
        rows: Number of rows of the dataset.
        seed: Seed of the draws.
        shuffle: Must be true.
        weights: Weight of each row `[rows]`, 0 or more; they need not sum to 1.
        replacement: Whether a row may be drawn again before the round ends.
        num_samples: Draws of a round without replacement; None: each row above 0 once.

    Raises:
        ValueError: Weights that are not as many as rows, negative, not finite or all 0; more draws
            of a round than rows above 0; `shuffle=False`.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        shuffle: bool,
        *,
        weights: Sequence[float] | np.ndarray,
        replacement: bool = True,
        num_samples: int | None = None,
    ) -> None:
        options.require(shuffle, "weights: rows are drawn at random, so shuffle=false is refused")
        super().__init__(rows, seed, shuffle)
        self.weights = np.asarray(weights, np.float64)
        shape = f"weights: {list(self.weights.shape)} of them for {rows} rows"
        options.require(self.weights.shape == (rows,), shape)
        sound = bool(np.isfinite(self.weights).all()) and self.weights.min() >= 0
        options.require(sound, "weights must be finite and not negative")
        self._rows = np.flatnonzero(self.weights)  # that may be drawn
        self._sums = np.cumsum(self.weights[self._rows])
        options.require(len(self._rows) > 0, "weights: one must be above 0")
        text = f"num_samples={num_samples} counts draws without replacement: give replacement=false"
        options.require(not replacement or num_samples is None, text)
        options.at_least(1, num_samples=num_samples)
        self.replacement = replacement
        #: Draws that `epoch` makes together: of a round, or with replacement any number.
        self.epoch_rows = rows if replacement else num_samples or len(self._rows)
        text = (
            f"num_samples={num_samples} draws without replacement, but only {len(self._rows)} rows "
            "have a weight above 0"
        )
        options.require(replacement or self.epoch_rows <= len(self._rows), text)
        self.every_row_once = not replacement and self.epoch_rows == rows

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of one round of draws in their order, int64 `[epoch_rows]`."""
        bits = np.random.Philox(np.random.SeedSequence([self.seed, number, _PURPOSE]))
        draws = self.epoch_rows if self.replacement else len(self._rows)
        uniform = (bits.random_raw(draws) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        if self.replacement:
            found = np.searchsorted(self._sums, uniform * self._sums[-1], side="right")
            return self._rows[np.minimum(found, len(self._rows) - 1)]  # the product may round up
        waiting = -_log(1.0 - uniform) / self.weights[self._rows]
        return self._rows[np.argsort(waiting, kind="stable")[: self.epoch_rows]]

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order; it is saved with a position."""
        how = "with" if self.replacement else f"{self.epoch_rows} without"
        return {
            **super().identity(),
            "order": f"weighted 1, {how} replacement, weights {self._digest}",
        }

    @cached_property
    def _digest(self) -> str:
        return fingerprint(np.ascontiguousarray(self.weights).tobytes())[:16]


def _log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithm, x above 0, by exact operations alone.

    Those of mathematics libraries differ in the last bit from machine to machine, and so could the
    order of two rows.
    """
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    small = mantissa < np.sqrt(0.5)
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    z = (mantissa - 1) / (mantissa + 1)
    square, total = z * z, np.zeros_like(z)
    for n in reversed(range(_TERMS)):  # log(m) = 2 (z + z^3 / 3 + z^5 / 5 + ...), |z| < 0.172
        total = total * square + 1 / (2 * n + 1)
    found: np.ndarray = 2 * z * total + exponent * 0.6931471805599453
    return found
