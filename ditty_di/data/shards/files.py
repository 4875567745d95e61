"""Files of token ids: one reader of their content, and where documents begin in each format."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditty_di.data.shards.megatron import MegatronIndex, add_suffix


class TokenFile:
    """Token ids in a file, read by position. Reads share nothing, so workers may be forked.

    Args:
        path: The file.
        dtype: Type of the ids.
        tokens: Number of ids.
        offset: Byte of the first one.

    Raises:
        ValueError: The file has another size.
    """

    #: Files that an open object holds.
    open_files = 1

    def __init__(self, path: Path, dtype: np.dtype, tokens: int, offset: int = 0) -> None:
        self.path, self.dtype, self.tokens, self.offset = path, dtype, tokens, offset
        found, expected = path.stat().st_size, offset + tokens * dtype.itemsize
        if found != expected:
            raise ValueError(
                f"{path}: {found} bytes, expected {expected} for {tokens} tokens of {dtype}: "
                "truncated or damaged"
            )
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions `start` to `stop - 1`."""
        size = self.dtype.itemsize
        first, wanted = self.offset + start * size, (stop - start) * size
        data = os.pread(self._descriptor, wanted, first)
        if len(data) != wanted:
            raise ValueError(f"{self.path}: byte {first + len(data)}: the file ends early")
        return np.frombuffer(data, self.dtype)

    def document_starts(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Return where documents begin within ids that were read at `start`, `[documents]`.

        Positions are relative to `start`. Whether a document begins at 0 is left out: what is read
        begins there anyway.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class MegatronFile(TokenFile):
    """`PREFIX.bin` with `PREFIX.idx`, of Megatron, NeMo, dolomite-engine and ditty_di."""

    open_files = 2

    def __init__(self, prefix: Path, index: MegatronIndex | None = None) -> None:
        self.index = index or MegatronIndex(add_suffix(prefix, ".idx"))
        super().__init__(add_suffix(prefix, ".bin"), self.index.dtype, self.index.tokens)

    def document_starts(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Return where documents begin, from the index."""
        return self.index.document_starts(start + 1, start + len(tokens), start)


class DatatroveFile(TokenFile):
    """datatrove's `NAME.ds` with `NAME.ds.index`, and `NAME.ds.metadata` if there is one.

    The index has the end of each document, uint64, in tokens. Without metadata the ids are as wide
    as their number makes the file.
    """

    open_files = 2

    def __init__(self, path: Path) -> None:
        index = add_suffix(path, ".index")
        size = index.stat().st_size
        if not size or size % 8:
            raise ValueError(f"{index}: {size} bytes, expected a multiple of 8")
        self.ends = memoryview(np.memmap(index, "<u8", "r"))  # type: ignore[arg-type]
        tokens = int(self.ends[-1])
        super().__init__(path, np.dtype(f"<u{self._itemsize(path, tokens)}"), tokens)

    @staticmethod
    def _itemsize(path: Path, tokens: int) -> int:
        metadata = add_suffix(path, ".metadata")
        if not metadata.exists():
            return 4 if path.stat().st_size > 2 * tokens else 2
        said = metadata.read_text(encoding="utf-8").partition("\n")[0].rpartition("|")[2]
        if said not in ("2", "4"):
            raise ValueError(f"{metadata}: {said!r} bytes a token, expected 2 or 4")
        return int(said)

    def document_starts(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Return where documents begin, from the index."""
        first = bisect_right(self.ends, start)
        last = bisect_right(self.ends, start + len(tokens) - 1, first)
        return np.frombuffer(self.ends[first:last], "<u8").astype(np.int64) - start


class NumpyFile(TokenFile):
    """A one-dimensional `.npy` file, as dtt writes them; documents end with EOS.

    Args:
        path: The file.
        eos: Id that ends a document; None: the file is one document.
    """

    def __init__(self, path: Path, eos: int | None = None) -> None:
        self.eos = eos
        with path.open("rb") as stream:
            try:
                version = np.lib.format.read_magic(stream)
                headers = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }
                shape, _, dtype = headers[version](stream)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{path}: byte 0: not the content of a .npy file: {error}"
                ) from error
            if len(shape) != 1 or dtype.kind not in "ui":
                raise ValueError(f"{path}: {dtype} of shape {shape}, expected a list of token ids")
            super().__init__(path, dtype, shape[0], stream.tell())

    def document_starts(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Return where documents begin: after each EOS."""
        if self.eos is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(tokens[:-1] == self.eos) + 1


@dataclass(frozen=True)
class ShardFile:
    """A file that is opened when a row of it is read.

    Attributes:
        path: Argument of `open`, as a `Path`; thousands of these would take longer than all else.
        open: Opens it: a class of `TokenFile`, or a partial of one.
        tokens: Number of tokens that are used.
        start: First of them.
        in_file: Number of tokens that the file must have; None is not compared.
    """

    path: str | Path
    open: Callable[[Path], TokenFile]
    tokens: int
    start: int = 0
    in_file: int | None = None


class OpenFiles:
    """The files that were read last, at most `limit` descriptors of them.

    Args:
        shards: All files.
        limit: Largest number of open files.
    """

    def __init__(self, shards: list[ShardFile], limit: int = 64) -> None:
        self.shards, self.limit = shards, limit
        self._open: OrderedDict[int, TokenFile] = OrderedDict()

    def __getitem__(self, number: int) -> TokenFile:
        """Return shard `number`, open.

        Raises:
            ValueError: It has another number of tokens than the manifest says.
        """
        if (found := self._open.get(number)) is not None:
            self._open.move_to_end(number)
            return found
        shard = self.shards[number]
        found = shard.open(Path(shard.path))
        if shard.in_file not in (None, found.tokens):
            found.close()
            raise ValueError(
                f"{found.path}: {found.tokens} tokens, but the manifest says {shard.in_file}"
            )
        self._open[number] = found
        while len(self._open) > 1 and self.descriptors > self.limit:
            self._open.popitem(last=False)[1].close()
        return found

    @property
    def descriptors(self) -> int:
        """Number of open files."""
        return sum(file.open_files for file in self._open.values())

    def __getstate__(self) -> dict[str, object]:  # workers that are not forked open their own
        return {**self.__dict__, "_open": OrderedDict()}
