"""Megatron's `.bin`/`.idx`: token ids of documents, and the table of where they begin.

All numbers are little endian. A `.bin` file has the token ids and nothing else. An `.idx` file of S
sequences and D documents has `34 + 12 S + 8 (D + 1)` bytes:

| bytes | content |
| --- | --- |
| 9 | `MMIDIDX`, two zeros |
| 8 | version, 1 |
| 1 | token type: 8 is uint16, 4 is int32 |
| 8 | S |
| 8 | D + 1 |
| 4 S | int32 lengths of the sequences, in tokens |
| 8 S | int64 positions of the sequences in `.bin`, in bytes |
| 8 (D + 1) | int64 document marks: document d is sequences `mark[d]` to `mark[d + 1] - 1` |
| S, optional | int8 modes of the sequences, ignored |
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from ditty_di.data.shards.manifest import Shard
from ditty_di.io import fsync, replacing

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
#: Token types by their number in the index. Megatron has more, none of which holds token ids.
TOKEN_TYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_MAX_LENGTH = np.iinfo(np.int32).max
#: Documents up to which a list is faster than four calls of NumPy.
_FEW = 12
#: Sequences among which the last one of a row is looked for first.
_NEAR = 32


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type of a vocabulary's ids: uint16 up to 65,536 ids, else int32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def write_index(
    path: str | os.PathLike[str],
    lengths: ArrayLike,
    document_marks: ArrayLike | None = None,
    dtype: np.dtype | str = "<u2",
) -> None:
    """Write an `.idx` file.

    Args:
        path: The file.
        lengths: Lengths of the sequences `[sequences]`, in tokens.
        document_marks: First sequence of each document, and the number of sequences
            `[documents + 1]`; None: each sequence is a document.
        dtype: Type of the token ids in the `.bin` file.

    Raises:
        ValueError: A token type that is neither uint16 nor int32, a length that int32 does not
            hold, or marks that do not rise from 0 to the number of sequences.
    """
    numbers = {known: number for number, known in TOKEN_TYPES.items()}
    if (dtype := np.dtype(dtype)) not in numbers:
        raise ValueError(f"token type {dtype}: an index has uint16 or int32")
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not 0 <= sizes.min() <= sizes.max() <= _MAX_LENGTH:
        raise ValueError(f"{path}: lengths must be from 0 to {_MAX_LENGTH} tokens")
    marks = np.arange(len(sizes) + 1) if document_marks is None else np.asarray(document_marks)
    if not len(marks) or (marks[0], marks[-1]) != (0, len(sizes)) or (np.diff(marks) < 0).any():
        raise ValueError(f"{path}: document marks must rise from 0 to {len(sizes)}")
    positions = (np.cumsum(sizes) - sizes) * dtype.itemsize
    with Path(path).open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, numbers[dtype], len(sizes), len(marks)))
        for table, kind in ((sizes, "<i4"), (positions, "<i8"), (marks, "<i8")):
            stream.write(table.astype(kind).tobytes())


class IndexWriter:
    """A writer of one shard, `PREFIX.bin` and `PREFIX.idx`; see `IndexWriter.open`.

    Args:
        prefix: Path of the files without `.bin` and `.idx`.
        dtype: Type of the token ids, see `token_dtype`.
        stream: The open `.bin` file.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, stream: BinaryIO) -> None:
        self.prefix, self.dtype, self._stream = prefix, dtype, stream
        self.lengths, self.marks = array("i"), array("q", [0])
        self.tokens = 0
        self._digest = hashlib.sha256()
        self._largest = np.iinfo(dtype).max

    @classmethod
    @contextmanager
    def open(cls, prefix: str | os.PathLike[str], dtype: np.dtype | str) -> Iterator[IndexWriter]:
        """Write a shard whose files appear at the end of the block, whole and flushed to disk.

        `.bin` is renamed first, so a shard with an `.idx` is whole. When the block raises, the
        files are left as they were.

            with IndexWriter.open(folder / "train-000000", token_dtype(vocab_size)) as writer:
                writer.add(ids)  # one document, its EOS included
            shard = writer.shard("train")
        """
        prefix, dtype = Path(prefix), np.dtype(dtype)
        with (
            replacing(add_suffix(prefix, ".idx")) as index,
            replacing(add_suffix(prefix, ".bin")) as payload,
            payload.open("wb") as stream,
        ):
            yield (writer := cls(prefix, dtype, stream))
            write_index(index, writer.lengths, writer.marks, dtype)
            fsync(index)
            stream.flush()
            os.fsync(stream.fileno())
        fsync(prefix.parent)

    def add(self, *sequences: ArrayLike) -> None:
        """Append a document of one or more sequences of token ids.

        Raises:
            ValueError: An id that the token type does not hold.
        """
        for sequence in sequences:
            self.lengths.append(self._write(sequence))
        self.marks.append(len(self.lengths))

    def add_documents(self, ids: ArrayLike, lengths: Sequence[int]) -> None:
        """Append documents of one sequence each, at a fraction of the time of as many `add`.

        Args:
            ids: Token ids of all documents, one after the other `[tokens]`.
            lengths: Lengths of the documents, in tokens, `[documents]`.

        Raises:
            ValueError: An id that the token type does not hold, or lengths of another sum.
        """
        if (total := sum(lengths)) != (found := np.shape(ids)[0]):
            raise ValueError(f"{self.prefix}: {found} token ids for documents of {total}")
        self._write(ids)
        first = len(self.lengths) + 1
        self.lengths.extend(lengths)
        self.marks.extend(range(first, first + len(lengths)))

    def _write(self, sequence: ArrayLike) -> int:
        """Append token ids to `.bin`; return their number."""
        ids = np.asarray(sequence, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() > self._largest):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"{self.prefix}: {self.dtype} does not hold the token id {wrong}")
        data = ids.astype(self.dtype).data
        self._stream.write(data)
        self._digest.update(data)
        self.tokens += len(ids)
        return len(ids)

    def shard(self, split: str) -> Shard:
        """Return the manifest's entry of this shard."""
        documents, digest = len(self.marks) - 1, self._digest.hexdigest()
        return Shard(self.prefix.name, split, documents, self.tokens, self.dtype.str, digest)


class MegatronIndex:
    """An `.idx` file, mapped.

    Args:
        path: The file.

    Raises:
        ValueError: The file is truncated, damaged, or no index; the message has file and byte.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as stream:
            head, size = stream.read(HEADER.size), os.fstat(stream.fileno()).st_size
            if head[:9] != MAGIC[: len(head)] or not head:
                raise ValueError(
                    f"{path}: byte 0: not a Megatron index: it begins with {head[:9]!r}"
                )
            if len(head) < HEADER.size:
                raise ValueError(f"{path}: {size} bytes, expected a header of {HEADER.size}")
            _, version, kind, self.sequences, marks = HEADER.unpack(head)
            if version != 1:
                raise ValueError(f"{path}: byte 9: version {version}, expected 1")
            if kind not in TOKEN_TYPES:
                known = ", ".join(f"{number} ({dtype})" for number, dtype in TOKEN_TYPES.items())
                raise ValueError(f"{path}: byte 17: token type {kind}, expected one of {known}")
            self.dtype, self.documents = TOKEN_TYPES[kind], marks - 1
            positions = HEADER.size + 4 * self.sequences
            table = positions + 8 * self.sequences
            end = table + 8 * marks
            if marks < 1 or size not in (end, end + self.sequences):
                raise ValueError(
                    f"{path}: {size} bytes, expected {end} for {self.sequences} sequences and "
                    f"{self.documents} documents: truncated or damaged"
                )
            mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        #: Lengths of the sequences, in tokens; their positions, in bytes; the document marks.
        # Not NumPy: the tables are not aligned, and np.searchsorted would copy them at each call.
        self.lengths = mapped[HEADER.size : positions].cast("i")
        self.positions = mapped[positions:table].cast("q")
        self.marks = mapped[table:end].cast("q")
        if (self.marks[0], self.marks[-1]) != (0, self.sequences):
            raise ValueError(
                f"{path}: byte {table}: document marks from {self.marks[0]} to {self.marks[-1]}, "
                f"expected 0 to {self.sequences}"
            )
        self.tokens = 0
        if self.sequences:
            self.tokens = self.positions[-1] // self.dtype.itemsize + self.lengths[-1]

    def document_starts(self, start: int, stop: int, origin: int = 0) -> np.ndarray:
        """Return the tokens from `start` to `stop - 1` at which a document begins, ascending.

        Args:
            start: the first token.
            stop: the token behind the last one.
            origin: what the results are relative to.
        """
        # Written out: it is a third of the time that reading a row takes.
        size, positions, marks = self.dtype.itemsize, self.positions, self.marks
        first, end = bisect_left(positions, start * size), stop * size
        last = bisect_left(positions, end, first, near := min(first + _NEAR, self.sequences))
        if last == near:
            last = bisect_left(positions, end, near)
        # The documents that begin with one of these sequences.
        low = self._document(first)
        high = self._document(last, low)
        if high - low <= _FEW:
            return np.array([positions[n] // size - origin for n in marks[low:high]], np.int64)
        begins = np.frombuffer(positions[first:last], "<i8")
        return begins[np.frombuffer(marks[low:high], "<i8") - first] // size - origin

    def _document(self, sequence: int, first: int = 0) -> int:
        """Return the first document that begins with a sequence or a later one."""
        marks = self.marks
        # Where each document is one sequence.
        same = first < sequence <= self.documents and marks[sequence] >= sequence
        if same and marks[sequence - 1] < sequence:
            return sequence
        return bisect_left(marks, sequence, first)


def add_suffix(prefix: Path, suffix: str) -> Path:
    """Return the path with a suffix appended; dots in its name are kept."""
    return prefix.with_name(prefix.name + suffix)
