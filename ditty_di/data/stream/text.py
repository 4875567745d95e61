"""Text that is tokenized while it is read: rows, a sample, and held-out rows of a stream."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from io import BytesIO
from typing import Any

import numpy as np

from ditty_di.data import options
from ditty_di.data.reading.corpus import text_of
from ditty_di.data.reading.splits import content_hash
from ditty_di.data.stream.streamed import Address, StatefulIterable, Streamed, iterated_alone
from ditty_di.data.tokenization.long_documents import pieces
from ditty_di.data.tokenization.sample import Sample
from ditty_di.data.tokenization.words import WordEncoder
from ditty_di.data.tokenizer import document_end_id, tokenizer_fingerprint
from ditty_di.data.windows import WindowRows

_SPLITS = ("train", "validation")
#: Text that is encoded at once, in bytes: the encodings need over a hundred times as much.
_PIECE = 1 << 20


class StreamedText(Streamed):
    """Rows of `seq_len` consecutive tokens of a text dataset, tokenized while it is read.

    Documents end in EOS and follow each other as in `Shards`, within a stream: over all its rows
    each token but the first is a label once. Tokens are those of `task=tokenize`.

    Args:
        dataset: See `Streamed`; its examples are mappings.
        tokenizer: A fast tokenizer of transformers, with EOS.
        seq_len: Length of a row, in tokens.
        split: `train`, or `validation`: the documents that are held out.
        validation_fraction: Fraction of the documents that is held out, by their hashes.
        text_key: Key of the document.
        documents: `masked` or `joined`, see `WindowRows`.
        streams: See `Streamed`.
        shuffle_rows: See `Streamed`.
        pad_id: Id of the padding's inputs.
        ignore_index: Label that is excluded from the loss.

    Raises:
        ValueError: An option out of range, a dataset without a state, a tokenizer without EOS; when
            rows are read, an example without text.
    """

    @staticmethod
    def validate(
        *,
        streams: int = 1,
        shuffle_rows: int = 1,
        seq_len: int = 1,
        documents: str = "masked",
        split: str = "train",
        validation_fraction: float | None = None,
    ) -> None:
        """Raise `ValueError` for an option out of range."""
        Streamed.validate(streams=streams, shuffle_rows=shuffle_rows)
        WindowRows.validate(seq_len=seq_len, documents=documents)
        options.one_of(_SPLITS, split=split)
        options.fraction(validation_fraction=validation_fraction)

    contract_for = staticmethod(WindowRows.contract_for)

    def __init__(
        self,
        dataset: StatefulIterable,
        tokenizer: Any,
        seq_len: int,
        *,
        split: str = "train",
        validation_fraction: float = 0.01,
        text_key: str = "text",
        documents: str = "masked",
        streams: int = 8,
        shuffle_rows: int = 256,
        pad_id: int = 0,
        ignore_index: int = -100,
    ) -> None:
        self.validate(split=split, validation_fraction=validation_fraction)
        super().__init__(dataset, streams=streams, shuffle_rows=shuffle_rows)
        self._row = WindowRows(seq_len, documents, pad_id, ignore_index)
        self.seq_len, self.contract = seq_len, self.contract_for(documents=documents)
        self.split, self.validation_fraction, self.text_key = split, validation_fraction, text_key
        self.eos = document_end_id(tokenizer)
        own = copy.deepcopy(tokenizer.backend_tokenizer)
        own.no_truncation()
        own.no_padding()
        self._encode = WordEncoder(own, self.eos)
        self._digest = tokenizer_fingerprint(tokenizer)[:12]

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order of rows but the seed."""
        rows = f"{self.seq_len} tokens of {self._digest}, {self.validation_fraction} held out"
        return {**super().identity(), "rows": rows}

    def finish(self, row: Any) -> Any:
        """Return the row `({"input", "position_ids"}, labels)` of a window."""
        return self._row(*row)

    def rows(
        self, stream: int, address: Address | None = None, *, once: bool = False
    ) -> Iterator[tuple[Address, Any]]:
        """Yield windows `(tokens, document starts)` of a stream, each with its address.

        An address is that of the example with the window's first token, and `offset` of the token
        in it.

        Args:
            stream: Number of the stream.
            address: That of the first row; None: the beginning.
            once: End where the dataset ends, with a shorter window; else begin again.
        """
        skipped = 0 if address is None else address["offset"]
        tokens = np.empty(0, np.int32)
        begins: list[tuple[int, Address]] = []  # where documents begin in `tokens`, or before it
        for found, ids in self._documents(stream, address, once):
            begins.append((len(tokens) - skipped, found))
            tokens = np.concatenate([tokens, ids[skipped:]])
            skipped = 0
            while len(tokens) > self.seq_len:
                yield self._window(tokens, begins)
                tokens = tokens[self.seq_len :]
                begins = [(at - self.seq_len, of) for at, of in begins]
                while len(begins) > 1 and begins[1][0] <= 0:
                    del begins[0]
        if len(tokens) > 1:
            yield self._window(tokens, begins)

    def _window(
        self, tokens: np.ndarray, begins: list[tuple[int, Address]]
    ) -> tuple[Address, tuple[np.ndarray, np.ndarray]]:
        """Return the address of the first tokens, and with them where documents begin later."""
        (at, first), *others = begins
        starts = [start for start, _ in others if start <= self.seq_len]
        row = tokens[: self.seq_len + 1].copy(), np.array(starts, np.int64)
        return {**first, "offset": -at}, row

    def _documents(
        self, stream: int, address: Address | None, once: bool
    ) -> Iterator[tuple[Address, np.ndarray]]:
        number, documents = -1, 1
        for found, example in super().rows(stream, address, once=once):
            if found["number"] <= number:  # it has begun again
                text = f"stream {stream}: none of its examples has text of the split {self.split!r}"
                options.require(documents > 0, text)
                documents = 0
            number = found["number"]
            try:
                data = document(example, self.text_key, self.split, self.validation_fraction)
            except ValueError as error:
                raise ValueError(f"example {number} of stream {stream}: {error}") from None
            if data:
                documents += 1
                ids = list[int]()
                for piece in pieces(BytesIO(data).read, _PIECE):
                    ids += self._encode([piece.text])[0]
                yield found, np.array([*ids, self.eos], np.int32)


def document(example: Any, text_key: str, split: str, validation_fraction: float) -> bytes:
    """Return an example's text as UTF-8; nothing if it is blank or of the other split.

    Raises:
        ValueError: The example has no text under the key.
    """
    text = text_of(dict(example), text_key)
    data = text.encode()
    if not text or text.isspace():
        return b""
    first = next(pieces(BytesIO(data).read, _PIECE))  # as task=tokenize decides
    held_out = content_hash(first.data) < int(validation_fraction * 2**64)
    return data if held_out == (split == "validation") else b""


@dataclass(eq=False)
class StreamSample(Sample):
    """Text from the beginning of a dataset to train a tokenizer on, read anew by each iteration.

    Held-out documents are left out.

    Args:
        dataset: See `StreamedText`.
        sample_mb: Size of the sample, in MiB.
        validation_fraction: See `StreamedText`.
        text_key: See `StreamedText`.
    """

    dataset: Iterable[Any]
    _: KW_ONLY
    sample_mb: float = 20.0
    validation_fraction: float = 0.01
    text_key: str = "text"

    def __post_init__(self) -> None:
        self.validate(sample_mb=self.sample_mb, validation_fraction=self.validation_fraction)

    def __iter__(self) -> Iterator[str]:
        left = int(self.sample_mb * 2**20)
        for example in iterated_alone(self.dataset):
            data = document(example, self.text_key, "train", self.validation_fraction)
            if data:
                yield data.decode()
            left -= len(data)
            if left <= 0:
                return


def first_rows(dataset: Streamed, rows: int) -> list[Any]:
    """Return the first rows of a dataset that is read in sequence, to validate on.

    Args:
        dataset: Read from its beginning, one row of each stream in turn, and at most once.
        rows: Number of rows; fewer if there are no more.

    Raises:
        ValueError: The stream has no rows.
    """
    options.at_least(1, rows=rows)
    streams = [dataset.rows(stream, once=True) for stream in range(dataset.streams)]
    found: list[Any] = []
    while streams and len(found) < rows:
        read = [(stream, next(stream, None)) for stream in streams[: rows - len(found)]]
        found += [dataset.finish(row[1]) for _, row in read if row is not None]
        ended = [stream for stream, row in read if row is None]
        streams = [stream for stream in streams if stream not in ended]
    options.require(bool(found), "no rows: nothing is held out, so raise validation_fraction")
    return found
