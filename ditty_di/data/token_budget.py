"""Micro-batches of as many rows as a number of tokens allows, padding included."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ditty_di.data import options
from ditty_di.data.content import fingerprint_with
from ditty_di.data.packing import GroupedRows, RaggedRows
from ditty_di.data.sampling.sampler import permutation

log = logging.getLogger(__name__)


class TokenBudgetDataset(GroupedRows):
    """A dataset whose rows are micro-batches: lists of rows of similar lengths.

    Padded to its longest row, each has at most `max_tokens` tokens. The rows are sorted by length
    and cut, once for the training: an epoch has every row once, and the loader shuffles the
    micro-batches. It takes one of them (`micro_batch_size=1`), so a `global_batch_size` counts
    micro-batches, and any layout resumes as with other rows. Collate with `PaddedCollate` or
    `Seq2SeqCollate`.

    Args:
        examples: Dataset of the rows, with `lengths` in tokens: `[rows]`, or `[rows, parts]`
            (attribute `part_lengths`) where the parts of a row are padded apart.
        max_tokens: Largest number of tokens of a micro-batch, padding included.
        pad_to_multiple_of: That of the collate function.
        seed: Seed of the order of equally long rows.

    Raises:
        ValueError: A row of more than `max_tokens` tokens when it is padded, a size below 1, or a
            mixture with ratios.
    """

    @staticmethod
    def validate(*, max_tokens: int = 1, pad_to_multiple_of: int | None = None) -> None:
        """Raise `ValueError` for an option out of range."""
        options.at_least(1, max_tokens=max_tokens, pad_to_multiple_of=pad_to_multiple_of)

    def __init__(
        self,
        examples: RaggedRows,
        max_tokens: int,
        *,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        self.validate(max_tokens=max_tokens, pad_to_multiple_of=pad_to_multiple_of)
        options.without_ratios(examples, "micro-batches of a number of tokens")
        self.examples, self.max_tokens = examples, max_tokens
        given = np.asarray(getattr(examples, "part_lengths", examples.lengths), np.int64)
        given = given.reshape(len(given), -1)  # [rows, parts]
        multiple = pad_to_multiple_of or 1
        padded = -(-np.maximum(given, 1) // multiple) * multiple
        tokens = padded.sum(1)
        options.require(len(tokens) > 0, "the dataset has no rows")
        if too_long := int((tokens > max_tokens).sum()):
            raise ValueError(
                f"{too_long} of {len(tokens)} rows alone have more than max_tokens={max_tokens} "
                f"tokens when they are padded, the longest {tokens.max()}: raise max_tokens, or "
                f"cut rows (data.seq_len)"
            )
        shuffled = permutation(seed, 0, len(tokens))
        self._members = shuffled[np.argsort(-tokens[shuffled], kind="stable")]
        ends = _cuts(padded[self._members].tolist(), max_tokens)
        self._bounds = np.fromiter(ends, np.int64)
        #: Length of the longest row, in tokens.
        self.longest = int(given.sum(1).max())
        longest = np.maximum.reduceat(padded[self._members], self._bounds[:-1])
        real = given.sum() / (longest.sum(1) * np.diff(self._bounds)).sum()
        log.info(
            "%d rows in %d micro-batches of at most %d tokens: %.1f %% of the tokens are real",
            *(len(tokens), len(self), max_tokens, 100 * real),
        )

    def __getitem__(self, index: int) -> list[Any]:
        return [self.examples[member] for member in self.members(index)]

    def fingerprint(self) -> str | None:
        """Return a digest of the rows and their micro-batches; None if the rows have none."""
        return fingerprint_with(self.examples, self._bounds.tobytes(), self._members.tobytes())


def _cuts(padded: Iterable[list[int]], max_tokens: int) -> Iterator[int]:
    """Yield where micro-batches begin, and the number of rows last.

    Args:
        padded: Lengths of the parts of each row.
        max_tokens: Largest number of tokens of a micro-batch.
    """
    yield (first := 0)
    longest: list[int] = []
    number = 0
    for number, lengths in enumerate(padded):
        longer = [*map(max, longest or lengths, lengths)]
        if sum(longer) * (number + 1 - first) > max_tokens:
            yield (first := number)
            longer = lengths
        longest = longer
    yield number + 1
