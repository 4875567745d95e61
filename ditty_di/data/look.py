"""Rows of token ids as text, and statistics of the documents in a dataset."""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ditty_di.data.options import require

#: Put around the text of tokens that are in the loss.
TRAINED = ("⟦", "⟧")
#: Unicode categories that clean text hardly has: control, format, private use, unassigned.
_ODD = ("Cc", "Cf", "Co", "Cn", "Cs")
_USUAL = frozenset("\n\t\r\u200d")  # line ends, tabs, and the joiner of emoji
_COMMON = 20  # tokens and characters that a report lists


def is_text(inputs: Any, labels: Any) -> bool:
    """Return whether a micro-batch is token ids `[batch, seq]` with labels `[batch, seq]`."""
    ids = inputs.get("input") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return False
    return ids.ndim == labels.ndim == 2 and not ids.is_floating_point()


def render_rows(
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ignore_index: int = -100,
    max_chars: int = 2000,
) -> Iterator[str]:
    """Yield each row of a micro-batch as text, `⟦...⟧` around what is in the loss.

    Documents of a packed row are shown one by one, and padding is counted.

    Args:
        inputs: `input` `[batch, seq]`; `position_ids` restart where a document begins. Labels of
            another shape are an encoder-decoder's: they are shown as the output.
        labels: token ids `[batch, seq]`, the token after each input.
        tokenizer: decodes the ids.
        ignore_index: label of a token that is not in the loss.
        max_chars: characters of a document at most.
    """
    ids, positions = inputs["input"], inputs.get("position_ids")
    for row in range(len(ids)):
        if "decoder_input_ids" in inputs:
            output = labels[row][labels[row] != ignore_index]
            mask = inputs.get("attention_mask")
            given = ids[row] if mask is None else ids[row][mask[row].bool()]
            parts = [
                (given.tolist(), [False] * len(given)),
                (output.tolist(), [True] * len(output)),
            ]
        else:
            restarts = None if positions is None else positions[row]
            found = _documents(ids[row], labels[row], restarts, ignore_index)
            parts = [document for _, document in found]
        yield "\n".join(_shown(parts, tokenizer, max_chars))


def _documents(
    ids: Tensor, labels: Tensor, positions: Tensor | None, ignore_index: int
) -> Iterator[tuple[int, tuple[list[int], list[bool]]]]:
    """Yield where each document of a row begins, its tokens, and which of them are in the loss."""
    starts = [0]
    if positions is not None:
        starts += (np.flatnonzero(positions[1:] == 0) + 1).tolist()
    for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield a, _unshifted(ids[a:b].tolist(), labels[a:b].tolist(), ignore_index)


def _unshifted(
    ids: list[int], labels: list[int], ignore_index: int
) -> tuple[list[int], list[bool]]:
    """Return a document's tokens, its last label included, and which of them are in the loss."""
    trained = [False, *(label != ignore_index for label in labels)]
    # The last token of an example is a label only: the input after it is padding.
    tokens = ids[:1] + [
        label if in_loss else following
        for label, in_loss, following in zip(labels, trained[1:], [*ids[1:], None], strict=True)
    ]
    end = len(tokens) - (tokens[-1] is None)
    return [token for token in tokens[:end] if token is not None], trained[:end]


def _shown(
    parts: list[tuple[list[int], list[bool]]], tokenizer: PreTrainedTokenizerBase, max_chars: int
) -> Iterator[str]:
    pad = tokenizer.pad_token_id
    for ids, trained in parts:
        end = len(ids)
        while end and not trained[end - 1] and ids[end - 1] == pad:
            end -= 1
        padding = f" and {len(ids) - end} of padding" if end < len(ids) else ""
        if not end:
            yield f"  {len(ids)} tokens of padding"
            continue
        text, at = "", 0
        for in_loss, run in groupby(trained[:end]):
            length = len(list(run))
            piece = str(tokenizer.decode(ids[at : at + length]))
            text += piece.join(TRAINED) if in_loss else piece
            at += length
        if len(text) > max_chars:
            text = f"{text[:max_chars]}... ({len(text) - max_chars} more characters)"
        yield f"  {end} tokens, {sum(trained)} in the loss{padding}:"
        yield "\n".join(f"    {line}" for line in text.split("\n"))


def named_sources(source: Any, names: Sequence[str]) -> str:
    """Return the sources of a row, or of some of its tokens, as text.

    Args:
        source: the number `[]`, that of each token `[tokens]`, or anything else, which is shown.
        names: name of each source, by its number.
    """
    if not isinstance(source, Tensor):
        return str(source)
    numbers = source.reshape(-1).unique().tolist()
    return ", ".join(names[n] if n < len(names) else str(n) for n in numbers)


def documents(
    dataset: Any, rows: int, tokenizer: PreTrainedTokenizerBase, ignore_index: int = -100
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield (source, token ids `[tokens]`, tokens in the loss) of the first rows' documents.

    A dataset with `tokens`, one flat array, is cut at the tokenizer's EOS; one with
    `whole_documents()`, such as `Shards`, has as many of them as these rows have tokens; rows with
    `position_ids` are cut where they restart; any other row is a document. A row may be a list of
    rows.

    Args:
        dataset: rows `({"input", ...}, labels)`; `source` in a row names where it is from, as such
            or as a number of the dataset's `source_names`.
        rows: how many rows are read at most.
        tokenizer: knows EOS.
        ignore_index: label of a token that is not in the loss.

    Raises:
        ValueError: rows of something else than token ids.
    """
    flat = getattr(dataset, "tokens", None)
    if isinstance(flat, np.ndarray) and tokenizer.eos_token_id is not None:
        flat = flat[: rows * int(dataset.seq_len) + 1]
        ends = np.flatnonzero(flat == tokenizer.eos_token_id) + 1
        for ids in np.split(flat, ends):
            if len(ids):
                yield "", np.asarray(ids, np.int64), len(ids)
        return
    if (whole := getattr(dataset, "whole_documents", None)) is not None:
        left = rows * int(dataset.seq_len)
        for ids in whole():
            yield "", ids.astype(np.int64), len(ids)
            if (left := left - len(ids)) <= 0:
                return
        return
    names = getattr(dataset, "source_names", ())
    for index in range(min(rows, len(dataset))):
        row = dataset[index]
        for inputs, labels in row if isinstance(row, list) else [row]:
            ids, source = inputs["input"], inputs.get("source", "")
            require(is_text({"input": ids[None]}, labels[None]), "rows are not token ids")
            found = _documents(ids, labels, inputs.get("position_ids"), ignore_index)
            for start, (tokens, trained) in found:
                of_token = source[start] if isinstance(source, Tensor) and source.dim() else source
                if any(trained):  # else padding
                    yield named_sources(of_token, names), np.asarray(tokens, np.int64), sum(trained)


class DocumentStatistics:
    """Statistics of one source's documents.

    Args:
        tokenizer: decodes the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []
        self.trained = self.chars = self.bytes = self.compressed = 0
        self.counts = np.zeros(len(tokenizer), np.int64)
        self.odd: Counter[str] = Counter()
        self._seen: Counter[bytes] = Counter()

    def add(self, ids: np.ndarray, trained: int) -> None:
        """Count one document.

        Args:
            ids: token ids `[tokens]`.
            trained: how many of them are in the loss.
        """
        self.lengths.append(len(ids))
        self.trained += trained
        counted = np.bincount(ids, minlength=len(self.counts))
        require(len(counted) == len(self.counts), f"token id {ids.max()} is not in the vocabulary")
        self.counts += counted
        self._seen[ids.tobytes()] += 1
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        raw = text.encode("utf-8", "replace")
        self.chars, self.bytes = self.chars + len(text), self.bytes + len(raw)
        self.compressed += len(zlib.compress(raw))
        self.odd.update(
            c
            for c in text
            if c == "\ufffd" or (unicodedata.category(c) in _ODD and c not in _USUAL)
        )

    def report(self) -> dict[str, Any]:
        """Return the numbers as JSON types; ratios of 0 documents are 0.

        `length_histogram` counts documents by the power of 2 that their length in tokens reaches;
        `compression` is bytes of text over bytes that zlib makes of each document.
        """
        lengths = np.asarray(self.lengths or [0])
        reached = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
        common = np.argsort(-self.counts, kind="stable")[:_COMMON]
        tokens = int(self.counts.sum())
        return {
            "documents": len(self.lengths),
            "tokens": tokens,
            "tokens_in_loss": self.trained,
            "length": {
                name: float(np.percentile(lengths, at))
                for name, at in (("median", 50), ("p95", 95), ("max", 100))
            },
            "length_histogram": {
                str(2**power): int((reached == power).sum()) for power in range(reached.max() + 1)
            },
            "characters_per_token": self.chars / max(tokens, 1),
            "compression": self.bytes / max(self.compressed, 1),
            "duplicates": sum(n - 1 for n in self._seen.values()),
            "tokens_never_used": int((self.counts == 0).sum()),
            "common_tokens": {
                str(self.tokenizer.convert_ids_to_tokens(int(i))): int(self.counts[i])
                for i in common
                if self.counts[i]
            },
            "odd_characters": {f"U+{ord(c):04X}": n for c, n in self.odd.most_common(_COMMON)},
        }
