"""Several examples in one row: less padding, and no example sees another."""

from __future__ import annotations

import logging
import operator
from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ditty_di.data.content import fingerprint_with
from ditty_di.data.order import permutation

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

OVERLONG = """\
{count} of {total} examples do not fit a row of seq_len={seq_len} (the longest has {longest} \
tokens): raise seq_len, cut examples with max_tokens={seq_len}, or give overlong=cut or \
overlong=drop"""


class RaggedRows(Protocol):
    """Rows `({"input": ids [length]}, labels [length])` of known lengths."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[dict[str, Tensor], Tensor]: ...


def best_fit_decreasing(lengths: np.ndarray, capacity: int, seed: int = 0) -> list[list[int]]:
    """Rows of `capacity` tokens as lists of the examples in them.

    Each example, from the longest to the shortest, goes where the least room is left over
    (https://arxiv.org/abs/2404.10830); which of equal ones comes first is drawn with `seed`. The
    same on every machine. Every length must be at most `capacity`.
    """
    shuffled = permutation(seed, 0, len(lengths))
    order = shuffled[np.argsort(-np.asarray(lengths)[shuffled], kind="stable")]
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows with that much room
    rooms: list[int] = []  # its keys that have rows, sorted
    for example in order.tolist():
        length = int(lengths[example])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        rows[row].append(example)
        if room > length:
            left = by_room.setdefault(room - length, [])
            if not left:
                insort(rooms, room - length)
            left.append(row)
    return rows


class Packed:
    """Rows of `seq_len` tokens with several examples each, packed once by best fit.

    Row i is `({"input", "position_ids"}, labels)`, all int64 `[seq_len]`. `position_ids` begin at
    0 in each example, by which transformers' attention keeps examples apart as long as there is no
    attention mask and no cache (`use_cache=False`); the padding at the end is apart as well, and
    has labels `ignore_index`. Which examples share a row follows from `seed` alone; the loader
    shuffles the rows. An epoch holds every example once.

    `overlong`: examples of more than `seq_len` tokens are an `error`, or `cut`, or left out
    (`drop`).

    Raises `ValueError` for them, and when no example is left.
    """

    @staticmethod
    def validate(*, seq_len: int = 1, overlong: str = "error") -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1")
        if overlong not in OVERLONG_CHOICES:
            raise ValueError(f"overlong={overlong!r} must be one of {', '.join(OVERLONG_CHOICES)}")

    def __init__(
        self,
        examples: RaggedRows,
        seq_len: int,
        *,
        pad_id: int | None = None,
        ignore_index: int = -100,
        seed: int = 0,
        overlong: str = "error",
    ) -> None:
        self.validate(seq_len=seq_len, overlong=overlong)
        self.examples, self.seq_len = examples, seq_len
        self.pad_id, self.ignore_index = pad_id or 0, ignore_index
        chosen = OVERLONG_CHOICES[overlong](np.asarray(examples.lengths), seq_len)
        lengths = np.minimum(examples.lengths[chosen], seq_len)
        packs = best_fit_decreasing(lengths, seq_len, seed)
        if not packs:
            raise ValueError(f"no example fits a row of seq_len={seq_len}")
        self._bounds = np.cumsum([0, *map(len, packs)])
        self._members = chosen[np.fromiter((i for pack in packs for i in pack), np.int64)]
        self.efficiency = float(lengths.sum()) / (len(packs) * seq_len)
        filled = np.add.reduceat(
            np.minimum(examples.lengths[self._members], seq_len), self._bounds[:-1]
        )
        #: Positions that occur: of the longest example, or of the longest padding.
        self.longest = int(max(lengths.max(), seq_len - filled.min()))
        log.info(
            "packed %d examples into %d rows of %d tokens: %.1f %% of the tokens are real",
            *(len(chosen), len(packs), seq_len, 100 * self.efficiency),
        )

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        import torch

        at = 0
        ids = torch.full((self.seq_len,), self.pad_id)
        labels = torch.full((self.seq_len,), self.ignore_index)
        positions = torch.empty(self.seq_len, dtype=torch.int64)
        for member in self.members(index):
            inputs, targets = self.examples[member]
            end = min(at + len(targets), self.seq_len)
            ids[at:end], labels[at:end] = inputs["input"][: end - at], targets[: end - at]
            positions[at:end] = torch.arange(end - at)
            at = end
        positions[at:] = torch.arange(self.seq_len - at)
        return {"input": ids, "position_ids": positions}, labels

    def fingerprint(self) -> str | None:
        """Of the examples and which of them share a row; None if the examples have none."""
        layout = (self._bounds, self._members)
        options = f"{self.seq_len} {self.pad_id} {self.ignore_index}"
        return fingerprint_with(self.examples, options, *(a.tobytes() for a in layout))

    def members(self, index: int) -> list[int]:
        """The examples of a row, in their order within it."""
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start, stop = self._bounds[row % len(self) :][:2]
        found: list[int] = self._members[start:stop].tolist()
        return found


def _refuse(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    count = int((lengths > seq_len).sum())
    if count:
        raise ValueError(
            OVERLONG.format(count=count, total=len(lengths), seq_len=seq_len, longest=lengths.max())
        )
    return np.arange(len(lengths))


#: What becomes of examples that are longer than a row: the examples that stay.
OVERLONG_CHOICES: dict[str, Any] = {
    "error": _refuse,
    "cut": lambda lengths, seq_len: np.arange(len(lengths)),
    "drop": lambda lengths, seq_len: np.flatnonzero(lengths <= seq_len),
}
