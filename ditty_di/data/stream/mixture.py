"""Streams and other datasets mixed in exact ratios, stream by stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ditty_di.data import options
from ditty_di.data.sampling.keyed import KeyedSampler
from ditty_di.data.sampling.mixture import with_source
from ditty_di.data.sampling.schedule import Schedule, period_of
from ditty_di.data.stream.streamed import RowStream


class StreamMixture:
    """Several datasets as one for a `StreamLoader`, of which at least one is read in sequence.

    Each stream has the rows of its sources in the ratios, at any prefix to less than one row, as
    `MixtureSampler` has them; so of all rows each source has its share to less than one row a
    stream. A `Streamed` source gives the rows of its own stream of the same number; any other
    dataset those of its epochs in their keyed order, in turn over the streams. A row has the number
    of its source as the input `source`, as in `Mixture`.

    Args:
        sources: Datasets by name; None leaves one out. Their rows must be alike: the same inputs.
        ratios: Share of each source in the rows, any positive numbers.

    Raises:
        ValueError: Other sources than ratios, none that is read in sequence, or streams of other
            numbers.
    """

    def __init__(self, sources: Mapping[str, Any], ratios: Mapping[str, float | str]) -> None:
        self.sources = {name: source for name, source in sources.items() if source is not None}
        given = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        options.require(
            given.keys() == self.sources.keys(),
            f"ratios are those of {[*given]}, the sources are {[*self.sources]}",
        )
        self.streamed = {name: s for name, s in self.sources.items() if hasattr(s, "open")}
        text = f"none of the sources {[*self.sources]} is a stream: take a Mixture"
        options.require(bool(self.streamed), text)
        numbers = {name: source.streams for name, source in sorted(self.streamed.items())}
        text = f"streams={numbers}: all sources of a mixture have the same number of streams"
        options.require(len({*numbers.values()}) == 1, text)
        self.streams: int = next(iter(numbers.values()))
        self.ratios = {name: given[name] for name in self.sources}
        self.schedule = Schedule({0: self.ratios})
        self._datasets = [*self.sources.values()]
        #: The name of each source, by its number.
        self.source_names = [*self.sources]
        #: Length of the rows in tokens, if the sources say it.
        self.seq_len: int | None = getattr(self._datasets[0], "seq_len", None)

    def check(self) -> None:
        """Raise `ValueError` unless each stream goes on exactly from its state."""
        for source in self.streamed.values():
            source.check()

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order of rows but the seed."""
        parts = {
            name: source.identity() if name in self.streamed else {"rows": len(source)}
            for name, source in self.sources.items()
        }
        periods = ", ".join(f"{name} {n}" for name, n in period_of(self.ratios).items())
        return {"streams": self.streams, "order": f"mixture 1: {periods}", "sources": parts}

    def open(self, stream: int, seed: int, state: dict[str, Any] | None = None) -> RowStream:
        """Open a stream at its beginning, or where a state was saved."""
        return _MixedRows(self, stream, seed, state or {"rows": 0, "sources": {}})

    def finish(self, row: tuple[int, Any]) -> Any:
        """Return a row of a stream in the form that is collated, with its source."""
        number, found = row
        if self.source_names[number] in self.streamed:
            found = self._datasets[number].finish(found)
        return with_source(torch.tensor(number), found)

    def get_metrics(self, consumed: int) -> dict[str, float]:
        """Return how many of the first rows are of each source, and its epochs if it has a length.

        Args:
            consumed: Number of rows of all streams.
        """
        each, more = divmod(consumed, self.streams)
        shorter, longer = (self.schedule.rows_before(each + n) for n in (0, 1))
        found = {}
        for name, source in self.sources.items():
            rows = (self.streams - more) * shorter[name] + more * longer[name]
            found[f"rows/{name}"] = float(rows)
            if name not in self.streamed:
                found[f"epochs/{name}"] = rows / len(source)
        return found


class _MixedRows:
    """The rows of one stream of a mixture, as pairs (number of the source, row)."""

    def __init__(
        self, mixture: StreamMixture, stream: int, seed: int, state: dict[str, Any]
    ) -> None:
        self._mixture, self._stream, self._rows = mixture, stream, state["rows"]
        self._opened = {
            name: source.open(stream, seed, state["sources"].get(name))
            for name, source in mixture.streamed.items()
        }
        self._samplers = {
            name: getattr(source, "keyed_sampler", KeyedSampler)(
                len(source), seed, True, purpose=name
            )
            for name, source in mixture.sources.items()
            if name not in mixture.streamed
        }

    def __next__(self) -> tuple[int, Any]:
        sources, rows = self._mixture.schedule.at(np.array([self._rows]))
        self._rows += 1
        number, row = int(sources[0]), int(rows[0])
        name = self._mixture.source_names[number]
        if name in self._opened:
            return number, next(self._opened[name])
        at = row * self._mixture.streams + self._stream
        (index,) = self._samplers[name].between(at, at + 1)
        return number, self._mixture.sources[name][index]

    def state_dict(self) -> dict[str, Any]:
        states = {name: rows.state_dict() for name, rows in self._opened.items()}
        return {"rows": self._rows, "sources": states}
