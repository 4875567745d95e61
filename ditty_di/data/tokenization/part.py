"""Tokenize one part: a shard a split, and last the receipt that says it is done."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ditty_di.data.reading.splits import content_hash
from ditty_di.data.shards.megatron import IndexWriter, token_dtype
from ditty_di.data.tokenization.documents import DocumentError, Piece, Reading
from ditty_di.data.tokenization.plan import Part
from ditty_di.data.tokenization.words import WordEncoder
from ditty_di.io import fsync, read_json, replacing

#: Text that is encoded at once, in bytes: the encodings need over a hundred times as much.
BATCH = 1 << 20
#: Skipped documents that a receipt names.
_NAMED = 5
#: Folder of the receipts.
RECEIPTS = "receipts"


@dataclass(frozen=True)
class Job:
    """Options that all parts share.

    Attributes:
        folder: Folder of the shards.
        tokenizer: The file `tokenizer.json`.
        key: Digest of everything that determines the bytes.
        eos: Id that ends each document.
        vocab_size: Number of the tokenizer's ids.
        reading: How documents are found in files.
        validation_fraction: Fraction of the documents that is held out, by their hashes.
        split_special_tokens: Take special tokens that are spelled out in a document as text.
        on_error: Action for a bad document: `raise`, or `skip` (and count).
    """

    folder: Path
    tokenizer: Path
    key: str
    eos: int
    vocab_size: int
    reading: Reading
    validation_fraction: float = 0.01
    split_special_tokens: bool = False
    on_error: str = "raise"

    def receipt(self, part: Part) -> Path:
        """Return the path of a part's receipt."""
        return self.folder / RECEIPTS / f"{part.number:06d}.json"


@dataclass(kw_only=True)
class Totals:
    """Numbers of one or several parts.

    Attributes:
        documents: Number of documents.
        characters: Characters of them.
        bytes: Bytes of them, in UTF-8.
        tokens: Tokens of them, with EOS.
        skipped: Number of bad documents by kind of fault.
        skipped_first: Messages of the first of them.
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_first: list[str] = field(default_factory=list)

    def add(self, other: Totals) -> None:
        """Add the numbers of other parts."""
        self.documents += other.documents
        self.characters += other.characters
        self.bytes += other.bytes
        self.tokens += other.tokens
        for kind, number in other.skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + number
        self.skipped_first = [*self.skipped_first, *other.skipped_first][:_NAMED]


@dataclass(kw_only=True)
class Receipt(Totals):
    """Result of a part.

    Attributes:
        key: Digest of everything that determines the bytes.
        part: Number of the part.
        shards: Entries of the manifest.
    """

    key: str
    part: int
    shards: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Receipt | None:
        """Read a receipt; None when there is none, or half of one."""
        found = read_json(path)
        return cls(**found) if isinstance(found, dict) else None


def run_part(job: Job, part: Part) -> Receipt:
    """Tokenize a part unless its receipt is there; a part must be one process's alone.

    Raises:
        DocumentError: A document cannot be read, and `on_error` is `raise`.
        OSError: The disk is full.
    """
    if (done := Receipt.read(job.receipt(part))) is not None and done.key == job.key:
        return done
    for leftover in job.folder.glob(f".*-{part.number:06d}.*"):
        leftover.unlink(missing_ok=True)  # of a process that was killed
    receipt = Receipt(key=job.key, part=part.number)
    with ExitStack() as stack:
        writing = _Writing(job, part, receipt, stack)
        for segment in part.segments:
            for found in job.reading.read(segment.path, segment.start, segment.stop):
                if isinstance(found, DocumentError):
                    writing.skip(found)
                else:
                    writing.add(found)
        writing.flush()
    receipt.shards = [asdict(writer.shard(split)) for split, writer in writing.writers.items()]
    receipt.shards.sort(key=lambda shard: shard["name"])
    path = job.receipt(part)
    with replacing(path) as aside:
        aside.write_text(json.dumps(asdict(receipt), indent=1) + "\n", encoding="utf-8")
        fsync(aside)
    fsync(path.parent)
    return receipt


class _Writing:
    """The documents of a part on their way to the shards."""

    def __init__(self, job: Job, part: Part, receipt: Receipt, stack: ExitStack) -> None:
        self.job, self.part, self.receipt, self.stack = job, part, receipt, stack
        self.encode = encoder_of(job.tokenizer, job.key, job.eos, job.split_special_tokens)
        self.dtype = token_dtype(job.vocab_size)
        self.limit = int(job.validation_fraction * 2**64)
        self.writers: dict[str, IndexWriter] = {}
        self.batch: list[Piece] = []
        self.size = 0
        # Ids of whole documents, by split.
        self.ended: dict[str, list[list[int]]] = {}
        # A long document, until its last piece: where it goes, and its ids so far.
        self.split = ""
        self.pending: list[np.ndarray] = []
        self.pending_size = (0, 0)

    def add(self, piece: Piece) -> None:
        if self.batch and self.size + len(piece.data) > BATCH:
            self.flush()
        self.batch.append(piece)
        self.size += len(piece.data)

    def skip(self, error: DocumentError) -> None:
        if self.job.on_error == "raise":
            raise error
        self.flush()
        self.pending.clear()  # the beginning of a document whose end cannot be read
        self.receipt.add(Totals(skipped={error.kind: 1}, skipped_first=[str(error)]))

    def flush(self) -> None:
        """Encode the batch and append the documents that end in it to the shards."""
        encoded = self.encode([piece.text for piece in self.batch])
        for piece, ids in zip(self.batch, encoded, strict=True):
            if not self.pending:  # by the beginning of a long document, which is all that is here
                held_out = content_hash(piece.data) < self.limit
                self.split = "validation" if held_out else "train"
            characters, size = self.pending_size if self.pending else (0, 0)
            characters, size = characters + len(piece.text), size + len(piece.data)
            if not piece.ends:
                self.pending.append(np.array(ids, self.dtype))
                self.pending_size = characters, size
                continue
            ids.append(self.job.eos)
            if self.pending:
                self._write()  # the documents before it
                self._writer(self.split).add(*self.pending, ids)
            else:
                self.ended.setdefault(self.split, []).append(ids)
            self.receipt.documents += 1
            self.receipt.tokens += sum(map(len, self.pending)) + len(ids)
            self.receipt.characters += characters
            self.receipt.bytes += size
            self.pending.clear()
        self._write()
        self.batch.clear()
        self.size = 0

    def _write(self) -> None:
        for split, documents in self.ended.items():
            ids = list(chain.from_iterable(documents))
            self._writer(split).add_documents(ids, list(map(len, documents)))
        self.ended.clear()

    def _writer(self, split: str) -> IndexWriter:
        if split not in self.writers:
            prefix = self.job.folder / f"{split}-{self.part.number:06d}"
            opened = IndexWriter.open(prefix, self.dtype)
            self.writers[split] = self.stack.enter_context(opened)
        return self.writers[split]


@lru_cache(maxsize=1)
def encoder_of(file: Path, key: str, eos: int, split_special_tokens: bool) -> WordEncoder:
    """Return the encoder of a `Job`: the parts of a process share it, and the words it knows."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = split_special_tokens
    return WordEncoder(tokenizer, eos)
