"""Datasets that are read in sequence: as rows in a fixed number of streams, exactly resumed."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ditty_di.data import options
from ditty_di.data.content import digest_of
from ditty_di.data.sampling.keyed import KeyedPermutation

log = logging.getLogger(__name__)

_NO_STATE = """\
dataset: a {kind} has no state_dict and load_state_dict, from which a resumed run goes on; \
give a `datasets.IterableDataset`, or any iterable that has both"""
_CHANGED = """\
dataset: stream {stream} does not go on with the example that it was saved at: give it the data \
that it began with, or begin them anew (load.data=false)"""
_INEXACT = """\
dataset: it does not go on with the same example from its own state_dict: leave its shuffle(...) \
out (the buffer's examples are not in its state), and shuffle by shuffle_rows"""
_NO_LENGTH = "a stream has no length and no rows by number: train for max_steps, not for epochs"
#: Examples after which `Streamed.check` tries a state: those of `datasets` say less at first.
_TRIED = 5
#: State from which a row is read again: that of the dataset before its first example, and more.
Address = dict[str, Any]


class StatefulIterable(Protocol):
    """An iterable dataset whose iteration goes on from a saved state, such as those of `datasets`.

    `state_dict()` is the state after the example that was yielded last, at first that of the
    beginning. The iteration that follows `load_state_dict` begins there. One in several files has
    `num_shards`, and `shard(num_shards, index, contiguous)`, which returns some of them as a
    dataset at its beginning.
    """

    def __iter__(self) -> Iterator[Any]:
        """Yield the examples."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last example."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Let the next iteration begin after that example."""


class RowStream(Protocol):
    """The endless rows of one stream."""

    def __next__(self) -> Any:
        """Return the next row, in a form that is cheap to send between processes."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the stream is opened with to go on after the last row."""


class Streamed:
    """The examples of an iterable dataset as rows, in `streams` streams for a `StreamLoader`.

    Stream s has the dataset's files s, s + `streams`, ... where it has as many (`shard` and
    `num_shards`, as those of `datasets` have), else every `streams`-th example, for which each
    stream reads all of them. At its end a stream begins again.

    Rows are shuffled within blocks of `shuffle_rows` rows of a stream. What is saved is where the
    block begins, and how many of its rows are done: a resume reads these rows again and goes on
    exactly, or says that it cannot.

    Args:
        dataset: A `datasets.IterableDataset`, or another iterable with `state_dict` and
            `load_state_dict`. Its examples are such as a `Loader` takes for rows.
        streams: Number of streams, a multiple of the ranks; a resumed run has the same.
        shuffle_rows: Rows of a stream that are shuffled together, of which up to twice as many are
            in memory; 1: they come in order.

    Raises:
        ValueError: An option out of range, or a dataset without a state.
    """

    @staticmethod
    def validate(*, streams: int = 1, shuffle_rows: int = 1) -> None:
        """Raise `ValueError` for an option out of range."""
        options.at_least(1, streams=streams, shuffle_rows=shuffle_rows)

    def __init__(
        self, dataset: StatefulIterable, *, streams: int = 8, shuffle_rows: int = 256
    ) -> None:
        Streamed.validate(streams=streams, shuffle_rows=shuffle_rows)
        has_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        options.require(has_state, _NO_STATE.format(kind=type(dataset).__name__))
        self.dataset, self.streams, self.shuffle_rows = dataset, streams, shuffle_rows
        self._start = copy.deepcopy(dataset.state_dict())
        self._by_files = getattr(dataset, "num_shards", 0) >= streams
        if streams > 1 and not self._by_files:
            log.warning(
                "the dataset has fewer files than streams=%d: each stream reads all of them and "
                "takes one example of %d",
                *(streams, streams),
            )

    def __len__(self) -> int:
        raise TypeError(_NO_LENGTH)

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order of rows but the seed."""
        return {"streams": self.streams, "shuffle_rows": self.shuffle_rows}

    def open(self, stream: int, seed: int, state: dict[str, Any] | None = None) -> RowStream:
        """Open a stream at its beginning, or where a state was saved."""
        return _Blocks(self, stream, seed, state)

    def finish(self, row: Any) -> Any:
        """Return a row of a stream in the form that is collated."""
        return row

    def check(self) -> None:
        """Raise `ValueError` unless the dataset goes on exactly from its state, as far as tried."""
        dataset = self._of_stream(0)
        options.require(not _has_buffer(dataset), _INEXACT)
        examples = iter(dataset)
        for _ in zip(range(_TRIED), examples, strict=False):
            pass
        state = dataset.state_dict()
        following = next(examples, None)
        dataset.load_state_dict(state)
        again = next(iter(dataset), None)
        options.require(digest_of(again) == digest_of(following), _INEXACT)

    def rows(
        self, stream: int, address: Address | None = None, *, once: bool = False
    ) -> Iterator[tuple[Address, Any]]:
        """Yield the rows of a stream in the dataset's order, each with its address.

        An address is the `state` before the example, its `number` in the pass, and a `digest` of
        it, by which a resume finds that a dataset has changed, or that its state is not exact.

        Args:
            stream: Number of the stream.
            address: That of the first row; None: the beginning.
            once: End where the dataset ends; else begin again.
        """
        step, first = (1, 0) if self._by_files else (self.streams, stream)
        dataset = self._of_stream(stream)
        start = state = dataset.state_dict()
        number, expected = 0, None
        if address is not None:
            state, number, expected = (address[key] for key in ("state", "number", "digest"))
            dataset.load_state_dict(copy.deepcopy(state))
        while True:
            for example in dataset:
                if number % step == first:
                    digest = digest_of(example).hex()[:16]
                    options.require(expected in (None, digest), _CHANGED.format(stream=stream))
                    expected = None
                    yield {"state": state, "number": number, "digest": digest}, example
                state, number = dataset.state_dict(), number + 1
            options.require(expected is None, _CHANGED.format(stream=stream))
            text = f"stream {stream} of {self.streams} has no example; lower streams"
            options.require(number > first, text)
            if once:
                return
            state, number = start, 0
            dataset.load_state_dict(copy.deepcopy(start))

    def _of_stream(self, stream: int) -> StatefulIterable:
        """Return the dataset of a stream at its beginning, whose iteration is its own."""
        number, index = (self.streams, stream) if self._by_files else (1, 0)
        dataset = iterated_alone(self.dataset, number, index)
        if not hasattr(dataset, "shard"):
            dataset.load_state_dict(copy.deepcopy(self._start))
        return dataset


def iterated_alone(dataset: Any, num_shards: int = 1, index: int = 0) -> Any:
    """Return a dataset for an iteration of its own: `shard` of it where it has that, else a copy.

    A dataset of `datasets` cannot be copied by another thread than it was made by: it refers to the
    Hub file systems of each thread, and copying adds one (datasets 4.7). The shard is at its
    beginning; a copy is where the dataset is.
    """
    if hasattr(dataset, "shard"):
        return dataset.shard(num_shards=num_shards, index=index, contiguous=False)
    return copy.deepcopy(dataset)


def _has_buffer(dataset: Any) -> bool:
    """Return whether a dataset of `datasets` has a shuffle buffer, which its state leaves out."""
    if "datasets" not in sys.modules:
        return False
    from datasets.iterable_dataset import BufferShuffledExamplesIterable

    parts = [getattr(dataset, "_ex_iterable", None)]
    while parts:
        if isinstance(part := parts.pop(), BufferShuffledExamplesIterable):
            return True
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return False


class _Blocks:
    """The rows of a stream, shuffled within blocks.

    While a block is passed on, the rows of the next one are read: one for each.
    """

    def __init__(
        self, dataset: Streamed, stream: int, seed: int, state: dict[str, Any] | None
    ) -> None:
        at = state or {"block": 0, "done": 0, "address": None}
        self._size, self._purpose, self._seed = dataset.shuffle_rows, f"stream {stream}", seed
        self._source = dataset.rows(stream, at["address"])
        self._ahead: list[tuple[Address, Any]] = []
        self._block = at["block"] - 1
        self._next_block()
        self._done = at["done"]

    def __next__(self) -> Any:
        if self._done == self._size:
            self._next_block()
        row = self._rows[self._order[self._done]]
        self._done += 1
        if 1 < self._size > len(self._ahead):
            self._ahead.append(next(self._source))
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"block": self._block, "done": self._done, "address": self._address}

    def _next_block(self) -> None:
        self._ahead += islice(self._source, self._size - len(self._ahead))
        self._address, self._rows = self._ahead[0][0], [row for _, row in self._ahead]
        self._ahead, self._block, self._done = [], self._block + 1, 0
        permutation = KeyedPermutation(self._size, self._seed, self._block, self._purpose)
        self._order = permutation(np.arange(self._size)).tolist()
