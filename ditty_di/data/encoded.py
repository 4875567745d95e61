"""Records as rows of integers, encoded once: labeled texts, tagged tokens, pairs of texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ditty_di.data import options
from ditty_di.data.cache import build_once, cache_folder, chunks, counted, fingerprint
from ditty_di.data.content import array_digest
from ditty_di.data.reading.sources import RecordDataset

# Raise it when the same rows would be stored in another way.
_FORMAT = 1
_RECORDS_AT_ONCE = 1000
_BAD_SHOWN = 10
_REHEARSED = 100
_LABELS = "labels"

#: The columns of a row: token ids and other integers by name, and `labels`.
Columns = dict[str, list[int]]


class RecordEncoder(Protocol):
    """Make the columns of records (`ditty_di.data.encoders`)."""

    def __call__(self, records: Sequence[Any]) -> list[Columns | ValueError]:
        """Return the columns of each record; for a bad record the error in their place."""

    def fingerprint(self) -> str:
        """Return a digest of everything that decides about the columns."""


class EncodedDataset:
    """A dataset of encoded records: every row has the same columns, of different lengths.

    `dataset[i]` is `({name: int64 [length], ...}, labels int64 [length])`, memory-mapped. The first
    process encodes, others wait for its files: no collective is involved.

    Args:
        records: The dataset of records.
        encode: Makes the columns of a record, `labels` among them.
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Attributes:
        lengths: Tokens of each row, `[rows]`: those of its longest column.

    Raises:
        ValueError: No records, or bad ones, all together, the first ten with file, line and reason.
    """

    @staticmethod
    def rehearse(build: Callable[[str], Any]) -> list[str]:
        """Encode the first hundred records.

        Raises:
            ValueError: Records that cannot be used.
        """
        records: RecordDataset = build("records")
        for _ in _rows(islice(records, _REHEARSED), build("encode"), records.if_empty):
            pass
        return []

    def __init__(
        self,
        records: RecordDataset,
        encode: RecordEncoder,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        key = fingerprint(records.fingerprint(), encode.fingerprint(), str(_FORMAT))
        self._folder = build_once(
            cache_folder(cache_dir) / "encoded" / key[:32],
            partial(_build, records=records, encode=encode),
        )
        self._open()

    def _open(self) -> None:
        files = sorted(self._folder.glob("*.offsets.npy"))
        self._columns = {
            file.name.removesuffix(".offsets.npy"): (
                np.load(file.with_name(file.name.replace(".offsets", "")), mmap_mode="r"),
                np.load(file),
            )
            for file in files
        }
        sizes = [np.diff(ends) for name, (_, ends) in self._columns.items() if name != _LABELS]
        self.lengths: np.ndarray = np.max(sizes, axis=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        row = options.row_index(index, len(self))
        found = {
            name: torch.from_numpy(values[ends[row] : ends[row + 1]].astype(np.int64))
            for name, (values, ends) in self._columns.items()
        }
        labels = found.pop(_LABELS)
        return found, labels

    def fingerprint(self) -> str:
        """Return a digest of all columns."""
        arrays = (array for pair in self._columns.values() for array in pair)
        return fingerprint(*self._columns, *map(array_digest, map(np.asarray, arrays)))

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}  # workers map the files again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _rows(
    records: Iterable[tuple[str, Any]], encode: RecordEncoder, if_empty: str
) -> Iterator[Columns]:
    """Yield the columns of all records; raise ValueError at the end for those that are bad."""
    total, bad, shown = 0, 0, list[str]()
    for chunk in chunks(records, _RECORDS_AT_ONCE):
        total += len(chunk)
        encoded = encode([record for _, record in chunk])
        for (where, _), columns in zip(chunk, encoded, strict=True):
            if not isinstance(columns, ValueError):
                yield columns
                continue
            bad += 1
            if len(shown) < _BAD_SHOWN:
                shown.append(f"{where}: {columns}")
    options.require(total > 0, if_empty)
    first = f"; the first {_BAD_SHOWN}" if bad > _BAD_SHOWN else ""
    options.require(
        not bad, "\n".join([f"{bad} of {total} records cannot be used{first}:", *shown])
    )


def _build(folder: Path, records: RecordDataset, encode: RecordEncoder) -> None:
    values: dict[str, list[np.ndarray]] = {}
    for columns in _rows(counted(records, "encoding records", "records"), encode, records.if_empty):
        for name, column in columns.items():
            values.setdefault(name, []).append(np.array(column, np.int32))
    folder.mkdir()
    for name, parts in values.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))
        np.save(folder / f"{name}.offsets.npy", np.cumsum([0, *map(len, parts)], dtype=np.int64))
