"""Rows of windows of tokens, with documents kept apart or joined."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditty_di.data import options

POSITIONS_CONTRACT = "-> input:2:i64, position_ids:2:i64 | ctx.target:2:i64"
JOINED_CONTRACT = "-> input:2:i64 | ctx.target:2:i64"
_DOCUMENTS = ("masked", "joined")
_NONE = np.array([], np.int64)


@dataclass(frozen=True)
class WindowRows:
    """Make the row `({"input", "position_ids"}, labels)` of a window, all int64 `[seq_len]`.

    `labels[t]` is the token after `input[t]`; a window of fewer tokens is padded.

    Attributes:
        seq_len: Length of a row, in tokens.
        documents: `masked`: `position_ids` restart at 0 in each document, by which attention keeps
            them apart, and the label across a document's end is ignored. `joined`: rows have no
            `position_ids`, and documents follow each other.
        pad_id: Id of the padding's inputs.
        ignore_index: Label that is excluded from the loss.

    Raises:
        ValueError: An option out of range.
    """

    seq_len: int
    documents: str = "masked"
    pad_id: int = 0
    ignore_index: int = -100

    @staticmethod
    def validate(*, seq_len: int = 1, documents: str = "masked") -> None:
        """Raise `ValueError` for an option out of range."""
        options.at_least(1, seq_len=seq_len)
        options.one_of(_DOCUMENTS, documents=documents)

    @staticmethod
    def contract_for(*, documents: str = "masked", **_: Any) -> str:
        """Return the contract of a micro-batch of these rows."""
        return POSITIONS_CONTRACT if documents == "masked" else JOINED_CONTRACT

    def __post_init__(self) -> None:
        self.validate(seq_len=self.seq_len, documents=self.documents)

    def __call__(
        self, tokens: np.ndarray, starts: np.ndarray = _NONE, ignored: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the row of some tokens.

        Args:
            tokens: Ids `[2 to seq_len + 1]`.
            starts: Where documents begin after the first, ascending.
            ignored: Labels at the beginning that are ignored.
        """
        length = len(tokens) - 1
        padded = length < self.seq_len
        inputs = np.full(self.seq_len, self.pad_id, np.int64) if padded else np.empty(length, "i8")
        labels = np.full(self.seq_len, self.ignore_index) if padded else np.empty(length, "i8")
        inputs[:length], labels[:length] = tokens[:-1], tokens[1:]
        labels[:ignored] = self.ignore_index
        row = {"input": torch.from_numpy(inputs)}
        if self.documents == "masked":
            labels[starts - 1] = self.ignore_index
            begins = [*starts.tolist(), *([length] if padded else []), self.seq_len]
            positions = self._arange.copy()
            for begin, end in pairwise(begins):
                positions[begin:end] = self._arange[: end - begin]
            row["position_ids"] = torch.from_numpy(positions)
        return row, torch.from_numpy(labels)

    @cached_property
    def _arange(self) -> np.ndarray:
        return np.arange(self.seq_len)
