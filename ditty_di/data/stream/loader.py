"""The data loader of streams: the same rows in the same order for any number of ranks that fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ditty_di.data import options
from ditty_di.data.loader import ResumableLoader, as_pair
from ditty_di.data.sampling.row_seeds import preserving
from ditty_di.data.stream.streamed import RowStream
from ditty_di.data.workers import start_worker, stop_signals_blocked
from ditty_di.launch import parent_death
from ditty_di.protocols import LoadedBatch
from ditty_di.seed import preserved_rng

#: Stream, row, and the stream's state after it.
_Row = tuple[int, Any, dict[str, Any]]
#: Key of a stream's state in that of the loader.
_STATE = "stream-{:05d}"


class StreamedDataset(Protocol):
    """Rows in a fixed number of streams: `Streamed`, `StreamedText`, `StreamMixture`."""

    streams: int
    """Number of streams."""

    def open(self, stream: int, seed: int, state: dict[str, Any] | None = None) -> RowStream:
        """Open a stream at its beginning, or where a state was saved."""

    def finish(self, row: Any) -> Any:
        """Return a row of a stream in the form that is collated."""

    def check(self) -> None:
        """Raise `ValueError` unless a stream goes on exactly from its state."""

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order of rows but the seed."""


class StreamLoader(ResumableLoader):
    """A data loader of datasets that are read in sequence; it never ends.

    Row g of all ranks is the next one of stream g modulo the number of streams. A global
    micro-batch is the next `micro_batch_size * dp_world_size` rows, of which rank r takes those of
    its own streams, r, r + `dp_world_size`, ... So any number of ranks that divides the number of
    streams sees the same rows in an optimizer step of the same size, and each row is read and
    tokenized by one rank and worker alone.

    `state_dict()` has the number of rows over all ranks, and the state of each stream of this rank;
    a checkpoint has those of all ranks. A loader with another `micro_batch_size`, `num_workers` or
    `dp_world_size` can load it, and goes on with exactly the next row. Only the first `iter()`
    after `load_state_dict` starts there. Only the newest iterator counts.

    Random numbers that the dataset draws itself are not saved.

    Args:
        dataset: A `Streamed`, `StreamedText` or `StreamMixture`.
        micro_batch_size: Rows a micro-batch, per rank.
        seed: Seed of the order.
        num_workers: Largest number of worker processes; their number divides the streams of the
            rank. 0 reads in this process.
        collate_fn: Makes a micro-batch of a list of rows; None: torch's `default_collate`.
        dp_rank: This data-parallel rank.
        dp_world_size: Number of data-parallel ranks.

    Raises:
        ValueError: An argument out of range, or a number of ranks that does not divide the number
            of streams; when reading, a dataset whose state is not exact.
        TypeError: Rows of another form, with the first micro-batch.
    """

    def __init__(
        self,
        dataset: StreamedDataset,
        micro_batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], LoadedBatch] | None = None,
        dp_rank: int = 0,
        dp_world_size: int = 1,
    ) -> None:
        self.validate(micro_batch_size=micro_batch_size, seed=seed, num_workers=num_workers)
        options.require(
            dataset.streams % dp_world_size == 0,
            f"streams={dataset.streams} is not a multiple of the {dp_world_size} data-parallel "
            "ranks: take a number that all runs can have, such as 64, from the beginning (another "
            "number is another order)",
        )
        self.dataset, self.seed, self.batch_size = dataset, seed, micro_batch_size
        self.dp_rank, self.dp_world_size, self.collate_fn = dp_rank, dp_world_size, collate_fn
        self.own = range(dp_rank, dataset.streams, dp_world_size)
        #: Number of worker processes.
        self.num_workers = max(
            (n for n in range(1, num_workers + 1) if len(self.own) % n == 0), default=0
        )
        self._collate = collate_fn or default_collate
        self._consumed = 0
        self._states: dict[int, dict[str, Any]] = {}  # of streams that have begun
        self._resuming = False

    #: It repeats its data without an end.
    endless = True

    def __iter__(self) -> Iterator[LoadedBatch]:
        if not self._resuming:
            self._consumed, self._states = 0, {}
        self._resuming = False
        return self._batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, everything that determines the order, and the streams' states."""
        states = {_STATE.format(stream): state for stream, state in self._states.items()}
        return {"consumed": self._consumed, **self._identity(), **states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: The position is one in another order of rows, or lacks streams.
        """
        here = self._identity()
        other = [name for name in here if state_dict.get(name) != here[name]]
        saved = {name: state_dict.get(name) for name in other}
        self._require_order(saved, {name: here[name] for name in other})
        self._consumed = int(state_dict["consumed"])
        begun = {n: _STATE.format(n) for n in self.own if n < self._consumed}
        missing = [name for name in begun.values() if name not in state_dict]
        options.require(not missing, f"the saved data position lacks {', '.join(missing)}")
        self._states = {stream: state_dict[name] for stream, name in begun.items()}
        self._resuming = True

    def get_metrics(self) -> dict[str, float]:
        """Return what the dataset reports about the rows so far, such as those of sources."""
        report = getattr(self.dataset, "get_metrics", None)
        return report(self._consumed) if report is not None else {}

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.dataset.identity()}

    def _batches(self) -> Iterator[LoadedBatch]:
        with preserved_rng():
            self.dataset.check()
        reader = _Reader(self.dataset, self.seed, self._order(), dict(self._states))
        if self.num_workers:
            return self._collated(self._with_workers(reader))
        return preserving(self._collated(iter(reader)))

    def _collated(self, rows: Iterator[_Row]) -> Iterator[LoadedBatch]:
        while True:
            taken = [next(rows) for _ in range(self.batch_size)]
            batch = self._collate([self.dataset.finish(row) for _, row, _ in taken])
            self._states.update((stream, state) for stream, _, state in taken)
            self._consumed += self.batch_size * self.dp_world_size
            yield as_pair(batch)

    def _order(self) -> list[int]:
        """Return the streams of this rank in the order in which they have a row, from here on."""
        first = self._consumed + (self.dp_rank - self._consumed) % self.dp_world_size
        step, streams = self.dp_world_size, self.dataset.streams
        return [(first + i * step) % streams for i in range(len(self.own))]

    def _with_workers(self, reader: _Reader) -> Iterator[_Row]:
        with stop_signals_blocked():
            return iter(
                DataLoader(
                    reader,
                    batch_size=None,
                    num_workers=self.num_workers,
                    collate_fn=_as_it_is,
                    prefetch_factor=max(2, -(-2 * self.batch_size // self.num_workers)),
                    # Its own: with the global generator, resuming would change dropout.
                    generator=torch.Generator(),
                    worker_init_fn=partial(start_worker, parent_death.in_main_thread()),
                )
            )


@dataclass(eq=False)
class _Reader(IterableDataset):
    """The rows of some streams in turn.

    Of several workers each has its own streams.

    Args:
        dataset: Opens the streams.
        seed: Seed of the order.
        order: The streams, in the order in which they have a row.
        states: Where streams go on that have begun.
    """

    dataset: StreamedDataset
    seed: int
    order: list[int]
    states: dict[int, dict[str, Any]]

    def __iter__(self) -> Iterator[_Row]:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self._rows(self.order)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # Otherwise `datasets` would take each stream for the whole and split it among the workers.
        torch.utils.data._utils.worker._worker_info = None
        return self._rows(self.order[worker.id :: worker.num_workers])

    def _rows(self, order: list[int]) -> Iterator[_Row]:
        streams = {n: self.dataset.open(n, self.seed, self.states.get(n)) for n in order}
        while True:
            for n in order:
                row = next(streams[n])
                yield n, row, streams[n].state_dict()


def _as_it_is(row: Any) -> Any:
    return row
