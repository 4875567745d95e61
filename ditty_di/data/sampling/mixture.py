"""Mixtures: several datasets as one, in exact ratios at any prefix of the training."""

from __future__ import annotations

import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ditty_di.data import options
from ditty_di.data.cache import fingerprint
from ditty_di.data.content import own_digest
from ditty_di.data.sampling.keyed import STORED_ROWS, KeyedSampler
from ditty_di.data.sampling.sampler import Sampler
from ditty_di.data.sampling.schedule import Schedule, period_of

log = logging.getLogger(__name__)

Ratios = Mapping[str, float | str]


class Mixture:
    """A dataset of several datasets, whose rows are numbered one dataset after the other.

    A row is that of its dataset, with its number among the sources as the input `source`, int64
    `[]`, which the trainer moves to the batch's context: its metrics are told by source. A row that
    is a list of rows (`TokenBudgetDataset`) has it in each. The loader orders the rows by
    `MixtureSampler`, unless it is given another sampler. The length is that of all datasets, so an
    epoch of the loader is that many rows; each source is repeated by its own epochs.

    Args:
        sources: Datasets by name; None leaves one out. Their rows must be alike: the same inputs.
        ratios: Share of each source in the rows, any positive numbers. None: no shares; each row of
            each source comes once an epoch.
        curriculum: Other ratios from an optimizer step on, by the step: `{1000: {...}, ...}`. A
            source may be 0 for a while.
        global_batch_size: Rows of an optimizer step, which a curriculum needs.

    Raises:
        ValueError: Unknown sources, one that is read in sequence, one whose ratio is never above 0,
            or ratios that repeat only after a million rows.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        ratios: Ratios | None = None,
        curriculum: Mapping[int, Ratios] | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        self.sources = {name: source for name, source in sources.items() if source is not None}
        streamed = [name for name, source in self.sources.items() if hasattr(source, "streams")]
        text = f"sources {streamed} are read in sequence: take StreamMixture and StreamLoader"
        options.require(not streamed, text)
        #: Number of rows of each source.
        self.rows = {name: len(source) for name, source in self.sources.items()}
        empty = [name for name, rows in self.rows.items() if not rows]
        options.require(bool(self.rows) and not empty, f"sources without rows: {empty or 'all'}")
        #: The name of each source, by its number.
        self.source_names = [*self.sources]
        self._datasets = [*self.sources.values()]
        self._ends: list[int] = np.cumsum([*self.rows.values()]).tolist()
        self.stages = _stages(self.rows, ratios, curriculum, global_batch_size)
        #: Whether remote shards are shuffled with all other rows; with ratios each is by itself.
        self.needs_pools = not self.stages and any(
            getattr(dataset, "needs_pools", False) for dataset in self._datasets
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        row = options.row_index(index, len(self))
        number = bisect_right(self._ends, row)
        found = self._datasets[number][row - (self._ends[number - 1] if number else 0)]
        return with_source(torch.tensor(number), found)

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row in tokens `[rows]`, if all sources know theirs (`lengths`)."""
        return np.concatenate([np.asarray(source.lengths) for source in self._datasets])

    @property
    def part_lengths(self) -> np.ndarray:
        """Those of the sources, `[rows, parts]`, if all have them (`TokenizedSeq2SeqDataset`)."""
        return np.concatenate([source.part_lengths for source in self._datasets])

    def get_metrics(self, sampler: Sampler, position: int) -> dict[str, float]:
        """Return the rows of each source before a position, as such and in its epochs.

        Args:
            sampler: The order of the rows.
            position: In its stream.
        """
        counted = sampler.rows_before(position, self._ends).tolist()
        rows = dict(zip(self.rows, counted, strict=True))
        epochs = {f"epochs/{name}": n / self.rows[name] for name, n in rows.items()}
        return epochs | {f"rows/{name}": float(n) for name, n in rows.items()}

    @property
    def sampler(self) -> Callable[[int, int, bool], Sampler] | None:
        """The order of these rows, in the ratios; without them the loader's default."""
        if self.stages:
            return partial(MixtureSampler, dataset=self)
        return KeyedSampler if len(self) > STORED_ROWS else None

    def fingerprint(self) -> str | None:
        """Return a digest of the sources; None if one has none."""
        digests = [own_digest(source) for source in self._datasets]
        if any(digest is None for digest in digests):
            return None
        return fingerprint(*self.rows, *map(str, digests))


def with_source(source: torch.Tensor, row: Any) -> Any:
    """Return a row with its source, or a list of such rows."""
    if isinstance(row, list):
        return [with_source(source, one) for one in row]
    if isinstance(row, Mapping):
        return {**row, "source": source}
    inputs, labels = row
    inputs = inputs if isinstance(inputs, Mapping) else {"input": inputs}
    return {**inputs, "source": source}, labels


def _stages(
    lengths: Mapping[str, int],
    ratios: Ratios | None,
    curriculum: Mapping[int, Ratios] | None,
    global_batch_size: int | None,
) -> dict[int, dict[str, float | str]]:
    """Return the ratios of all sources from a row on, by its position."""
    later = {int(step): of_step for step, of_step in (curriculum or {}).items()}
    if ratios is None:
        options.require(not later, "a curriculum needs the ratios that hold before it")
        return {}
    early = f"curriculum={[*later]}: its steps must be above 0; `ratios` hold from 0 on"
    options.require(min(later, default=1) > 0, early)
    text = "a curriculum counts in optimizer steps: it needs global_batch_size"
    options.require(not later or global_batch_size is not None, text)
    stages: dict[int, dict[str, float | str]] = {}
    for step, of_step in sorted({0: ratios, **later}.items()):
        given = {name: ratio for name, ratio in of_step.items() if ratio is not None}
        unknown, missing = given.keys() - lengths, lengths.keys() - given.keys()
        options.require(
            not unknown and not missing,
            f"ratios at step {step}: unknown sources {sorted(unknown)}, missing {sorted(missing)}; "
            f"the sources are {[*lengths]}",
        )
        stages[step * (global_batch_size or 1)] = {name: given[name] for name in lengths}
    unused = [name for name in lengths if not any(float(of[name]) > 0 for of in stages.values())]
    options.require(not unused, f"ratios: {', '.join(unused)} is never above 0; null leaves it out")
    return stages


class MixtureSampler(KeyedSampler):
    """A sampler of a `Mixture`: at any prefix each source has its share, to less than one row.

    The stream's next row of a source is the next one of that source's own epochs, each in its own
    keyed order. Nothing is stored but the sources of one period of the ratios, and any position is
    computed, so a resume on another layout is exact.

    Args:
        rows: Number of rows of the dataset.
        seed: Seed of the order.
        shuffle: Shuffle each epoch of each source; else its rows come in order.
        dataset: The mixture, with ratios.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool, *, dataset: Mixture) -> None:
        super().__init__(rows, seed, shuffle)
        self.source_rows, self.stages = dataset.rows, dataset.stages
        self.schedule = Schedule(dataset.stages)
        self._samplers = [
            getattr(source, "keyed_sampler", KeyedSampler)(len(source), seed, shuffle, purpose=name)
            for name, source in dataset.sources.items()
        ]
        ends = np.cumsum([*self.source_rows.values()])
        self._first = ends - [*self.source_rows.values()]
        self.epoch_rows = sys.maxsize  # each source has its own epochs

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order; it is saved with a position."""
        stages = "; ".join(
            f"from row {at}: " + ", ".join(f"{name} {n}" for name, n in period_of(of).items())
            for at, of in self.stages.items()
        )
        sources = ", ".join(f"{name} {n}" for name, n in self.source_rows.items())
        return {**super().identity(), "order": f"mixture 1 of {sources} rows, {stages}"}

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of as many positions as there are rows, `[rows]`."""
        return np.array(self.between(number * self.rows, (number + 1) * self.rows))

    def rows_before(self, position: int, ends: Sequence[int]) -> np.ndarray:
        """Return how many rows of each source come before a position, int64 `[sources]`.

        Args:
            position: In the stream.
            ends: Those of the sources.
        """
        return np.array([*self.schedule.rows_before(position).values()], np.int64)

    def rows_at(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Return the rows at some positions of the stream, int64 `[positions]`."""
        sources, taken = self.schedule.at(indices)
        rows = np.empty(len(indices), np.int64)
        for number, sampler in enumerate(self._samplers):
            here = np.flatnonzero(sources == number)
            epochs, indices = np.divmod(taken[here], sampler.rows)
            for epoch in np.unique(epochs).tolist():
                of_epoch = epochs == epoch
                rows[here[of_epoch]] = sampler.rows_at(epoch, indices[of_epoch])
            rows[here] += self._first[number]
        return rows
