"""Rows of shards: windows of tokens, with documents kept apart or joined."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ditty_di.data import options
from ditty_di.data.cache import fingerprint
from ditty_di.data.collate import ByArguments, PackedCollate
from ditty_di.data.reading.file_cache import FileCache
from ditty_di.data.sampling.keyed import STORED_ROWS, KeyedSampler
from ditty_di.data.sampling.pooled import PooledSampler
from ditty_di.data.shards.files import OpenFiles
from ditty_di.data.shards.find import ShardPath, find_shards
from ditty_di.data.shards.remote import RemoteShard, fetch_ahead, require_pool
from ditty_di.data.tokenizer import document_end_id, tokenizer_fingerprint
from ditty_di.data.windows import JOINED_CONTRACT, WindowRows
from ditty_di.protocols import LoadedBatch

#: Tokens that are read at once, of whole documents.
_BLOCK = 1 << 18


class Shards:
    """A dataset of rows of `seq_len` consecutive tokens of a folder of shards.

    Row i is `({"input", "position_ids"}, labels)`, all int64 `[seq_len]`, and `labels[t]` is the
    token after `input[t]`. Over all rows each token of a shard but its first is a label once; the
    last row of a shard is padded. Opening reads the manifest, or without one the head of each file;
    a shard is opened when a row of it is read, and at most 64 files are open. Shards of a URL are
    fetched whole when a row of them is read, so their rows are shuffled by `PooledSampler`.

    Args:
        path: A folder with `manifest.json`, which may be a URL such as `s3://bucket/folder`; or
            Megatron's `.bin`/`.idx`, datatrove's `.ds` or dtt's `.npy` files: a folder, one file,
            or a list.
        seq_len: Length of a row, in tokens.
        split: Split of the manifest, or of dtt's names; other files are all `train`.
        documents: `masked`: `position_ids` restart at 0 in each document, by which attention keeps
            them apart, and the label across a document's end is ignored. `joined`: rows have no
            `position_ids`, and documents follow each other.
        overlap: Tokens of the row before that a row begins with. They are context: their labels are
            ignored, so that no label counts twice.
        tokenizer: The run's tokenizer. Shards of another one are refused.
        pad_id: Id of the padding's inputs.
        ignore_index: Label that is excluded from the loss.
        max_open_files: Largest number of open files.
        cache: Where shards of a URL are fetched to; None: a `FileCache()`.

    Raises:
        ValueError: An option out of range, another tokenizer, damaged or missing shards.
        ImportError, FileNotFoundError, PermissionError, ConnectionError: Of a URL, see
            `remote.explained`.
    """

    @staticmethod
    def validate(*, seq_len: int = 1, documents: str = "masked", overlap: int = 0) -> None:
        """Raise `ValueError` for an option out of range."""
        WindowRows.validate(seq_len=seq_len, documents=documents)
        text = f"overlap={overlap} must be at least 0 and below seq_len={seq_len}"
        options.require(overlap == 0 or 0 < overlap < seq_len, text)

    contract_for = staticmethod(WindowRows.contract_for)

    def __init__(
        self,
        path: ShardPath | Sequence[ShardPath],
        seq_len: int,
        split: str = "train",
        *,
        documents: str = "masked",
        overlap: int = 0,
        tokenizer: Any = None,
        pad_id: int = 0,
        ignore_index: int = -100,
        max_open_files: int = 64,
        cache: FileCache | None = None,
    ) -> None:
        self.validate(seq_len=seq_len, documents=documents, overlap=overlap)
        self.seq_len, self.documents, self.overlap = seq_len, documents, overlap
        #: Makes the row of a window.
        self.row = WindowRows(seq_len, documents, pad_id, ignore_index)
        self.contract = self.contract_for(documents=documents)
        eos = document_end_id(tokenizer) if tokenizer is not None else None
        shards, self.manifest = find_shards(path, split, eos, cache)
        self.vocab_size = None if tokenizer is None else len(tokenizer)
        if self.manifest is not None:
            self.vocab_size = self.manifest.vocab_size
            if tokenizer is not None:
                self.manifest.require_tokenizer(tokenizer_fingerprint(tokenizer), str(path))
        self.files = OpenFiles(shards, max_open_files)
        #: Number of tokens of all shards.
        self.tokens = sum(shard.tokens for shard in shards)
        self._remote = {
            n: shard.open for n, shard in enumerate(shards) if isinstance(shard.open, RemoteShard)
        }
        #: Whether shards are fetched when they are read: no order may need all of them at once.
        self.needs_pools = bool(self._remote)
        self._stride = seq_len - overlap
        # A shard of n tokens has n - 1 labels, of which a row has `stride`, the first one more.
        labels = np.array([shard.tokens for shard in shards], np.int64) - 1
        rows = np.where(labels > 0, np.maximum(1, -(-(labels - overlap) // self._stride)), 0)
        #: Number of rows of each shard, `[shards]`.
        self.shard_rows = rows
        self._ends: list[int] = np.cumsum(rows).tolist()
        few = f"{path}: the shards of the split {split!r} have hardly any tokens"
        options.require(self._ends[-1] > 0, few)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def sampler(self) -> Callable[..., KeyedSampler] | None:
        """The order of remote or very many rows; None: the loader's default."""
        return self.keyed_sampler if self.needs_pools or len(self) > STORED_ROWS else None

    @property
    def keyed_sampler(self) -> Callable[..., KeyedSampler]:
        """The order of any number of rows, as `KeyedSampler` or a partial of a subclass."""
        return partial(PooledSampler, dataset=self) if self.needs_pools else KeyedSampler

    def prepare_pool(self, pool: int, shards: Sequence[int] = ()) -> None:
        """Prepare for reading rows of up to `pool` shards at a time.

        Args:
            pool: Number of shards whose rows are shuffled together.
            shards: The shards that are read next; remote ones are fetched in the background.

        Raises:
            ValueError: The cache does not hold that many.
        """
        remote = self._remote
        require_pool([*remote.values()], pool)
        fetch_ahead([remote[number] for number in shards if number in remote])

    def fingerprint(self) -> str | None:
        """Return a digest of the content and the rows; None without a manifest."""
        if self.manifest is None:
            return None
        parts = [shard.sha256 for shard in self.manifest.shards]
        settings = f"{self.seq_len} {self.documents} {self.overlap} {len(self)}"
        return fingerprint(self.manifest.key, settings, *parts)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return self.row(*self.window(index))

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the tokens of a row, up to `seq_len + 1`.

        Returns:
            The ids; where documents begin after the first; how many labels at the beginning are
            ignored.

        Raises:
            ValueError: An id that is not in the vocabulary; the message has file and byte.
        """
        # A call less: reading a row takes a few microseconds.
        row = index if 0 <= index < self._ends[-1] else options.row_index(index, len(self))
        number = bisect_right(self._ends, row)
        within = row - (self._ends[number - 1] if number else 0)
        file, shard = self.files[number], self.files.shards[number]
        at = within * self._stride
        start = shard.start + at
        tokens = file.read(start, shard.start + min(at + self.seq_len + 1, shard.tokens))
        # Of the ufunc: `tokens.max()` takes twice as long for a row.
        if self.vocab_size is not None and np.maximum.reduce(tokens) >= self.vocab_size:
            bad = int(tokens.argmax())
            raise ValueError(
                f"{file.path}: byte {file.offset + (start + bad) * file.dtype.itemsize}: token id "
                f"{tokens[bad]} does not fit the vocabulary of {self.vocab_size}"
            )
        starts = file.document_starts(start, tokens)
        return tokens, starts, self.overlap if within else 0

    def whole_documents(self) -> Iterator[np.ndarray]:
        """Yield the token ids of each document, in the order of the shards.

        Raises:
            ValueError: A damaged shard.
        """
        for number, shard in enumerate(self.files.shards):
            document, stop = list[np.ndarray](), shard.start + shard.tokens
            for at in range(shard.start, stop, _BLOCK):
                # From the token before: it is not told whether a document begins with the first.
                before = int(at > shard.start)
                file = self.files[number]
                tokens = file.read(at - before, min(at + _BLOCK, stop))
                starts = file.document_starts(at - before, tokens)
                rest, *others = np.split(tokens[before:], starts - before)
                document.append(rest)
                for other in others:
                    yield np.concatenate(document)
                    document = [other]
            yield np.concatenate(document)


@dataclass(frozen=True)
class ShardsCollate(ByArguments):
    """Stack rows of `Shards`: every tensor is `[rows, seq_len]`.

    Args:
        documents: That of the dataset, `masked` or `joined`.
        varlen: Add the arguments of flash attention to rows whose documents are masked.
    """

    documents: str = "masked"
    varlen: bool = True

    @classmethod
    def contract_for(cls, *, documents: str = "masked", varlen: bool = True) -> str:
        """Return the contract of a collate function with these arguments."""
        return (
            PackedCollate.contract_for(varlen=varlen) if documents == "masked" else JOINED_CONTRACT
        )

    @property
    def packs_documents(self) -> bool:
        """Whether the model is tested before training: documents must not attend to each other."""
        return self.documents == "masked"

    def __call__(self, rows: Sequence[LoadedBatch]) -> LoadedBatch:
        """Return the micro-batch of the rows."""
        return PackedCollate(varlen=self.varlen and self.packs_documents)(rows)
