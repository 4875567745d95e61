"""Samples of text to train a tokenizer on, and a report on a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ditty_di.data import options
from ditty_di.data.cache import fingerprint_of
from ditty_di.data.reading.splits import content_hash
from ditty_di.data.tokenization.documents import DocumentError, Piece, Reading
from ditty_di.data.tokenization.plan import Part, plan
from ditty_di.data.tokenization.sources import Source, all_sources

#: Places of a source that a sample is taken from.
_PLACES = 128
_UNUSED_SHOWN = 10


class Sample(ABC):
    """Text to train a tokenizer on, read anew by each iteration."""

    @staticmethod
    def validate(*, sample_mb: float = 1, validation_fraction: float = 0.0) -> None:
        """Raise `ValueError` for an option out of range."""
        options.require(sample_mb > 0, f"sample_mb={sample_mb} must be above 0")
        options.fraction(validation_fraction=validation_fraction)

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    def fingerprint(self) -> str:
        """Return a digest of the sample's content."""
        return fingerprint_of(self)


class TextSample(Sample):
    """Documents from all over some text, read anew by each iteration, one at a time.

    Held-out documents are left out. Bad ones are too: the tokenization reports them.

    Args:
        source: The text.
        sources: Or several by name, of which each gives an equal share.
        sample_mb: Size of the sample, in MiB.
        validation_fraction: Fraction of the documents that is held out.
    """

    def __init__(
        self,
        source: Source | None = None,
        sources: Mapping[str, Source] | None = None,
        *,
        sample_mb: float = 100.0,
        validation_fraction: float = 0.0,
    ) -> None:
        self.validate(sample_mb=sample_mb, validation_fraction=validation_fraction)
        self.sources = all_sources(source, sources)
        self.bytes = int(sample_mb * 2**20)
        self.held_out = int(validation_fraction * 2**64)

    def __iter__(self) -> Iterator[str]:
        for name in self.sources:
            yield from self.of(name)

    def of(self, name: str) -> Iterator[str]:
        """Yield the documents from one source."""
        source = self.sources[name]
        reading = Reading(source.text_key, source.documents)
        parts = plan(source.files(), reading, 1 << 22)
        budget = self.bytes // len(self.sources)
        if sum(part.size for part in parts) > budget:
            count = min(len(parts), _PLACES)
            parts = tuple(parts[i * len(parts) // count] for i in range(count))
        left = budget
        for number, part in enumerate(parts):
            share = left // (len(parts) - number)
            for piece in self._pieces(part, reading):
                if share <= 0 or left <= 0:
                    break
                share -= len(piece.data)
                left -= len(piece.data)
                yield piece.text

    def _pieces(self, part: Part, reading: Reading) -> Iterator[Piece]:
        for segment in part.segments:
            held_out, begins = False, True
            for piece in reading.read(segment.path, segment.start, segment.stop):
                if isinstance(piece, DocumentError):
                    begins = True
                    continue
                if begins:
                    held_out = content_hash(piece.data) < self.held_out
                begins = piece.ends
                if not held_out:
                    yield piece


def report(tokenizer: Any, sample: TextSample) -> dict[str, Any]:
    """Return what a tokenizer makes of a sample: compression by source, and unused entries.

    Args:
        tokenizer: A fast tokenizer of transformers.
        sample: The text.

    Returns:
        `sources` (documents, bytes, tokens, `characters_per_token` and `bytes_per_token` of each),
        `vocab_size`, and of its entries `unused` and some of them, `unused_examples`.
    """
    used = np.zeros(len(tokenizer), bool)
    sources = {}
    for name in sample.sources:
        documents, characters, size, tokens = 0, 0, 0, 0
        for text in sample.of(name):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            used[ids] = True
            documents, characters = documents + 1, characters + len(text)
            size, tokens = size + len(text.encode()), tokens + len(ids)
        sources[name or "text"] = {
            "documents": documents,
            "bytes": size,
            "tokens": tokens,
            "characters_per_token": characters / max(tokens, 1),
            "bytes_per_token": size / max(tokens, 1),
        }
    used[tokenizer.all_special_ids] = True
    unused = np.flatnonzero(~used)
    return {
        "sources": sources,
        "vocab_size": len(tokenizer),
        "unused": len(unused),
        "unused_examples": tokenizer.convert_ids_to_tokens(unused[:_UNUSED_SHOWN].tolist()),
    }
