"""Packing: several examples in one row, which do not attend to each other."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ditty_di.data import options
from ditty_di.data.content import fingerprint_with
from ditty_di.data.sampling.sampler import permutation

log = logging.getLogger(__name__)

_TRUNCATION = ("error", "cut", "drop")


class RaggedRows(Protocol):
    """A dataset of rows `({"input": ids [length]}, labels [length])` of known lengths."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[dict[str, Any], Tensor]: ...


def best_fit_decreasing(lengths: np.ndarray, capacity: int, seed: int = 0) -> list[list[int]]:
    """Distribute examples over rows by best fit decreasing (https://arxiv.org/abs/2404.10830).

    Each example, from the longest to the shortest, goes to the row with the least sufficient room.
    The same on every machine.

    Args:
        lengths: Lengths of the examples `[examples]`, each at most `capacity`.
        capacity: Length of a row.
        seed: Seed of the order of equally long examples.

    Returns:
        The examples of each row.
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


class GroupedRows:
    """Base of datasets of which each row is made of several rows of another one."""

    examples: RaggedRows
    _bounds: np.ndarray  # where the rows begin in `_members`, and its length
    _members: np.ndarray

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def source_names(self) -> list[str]:
        """The sources that are told apart by `source`."""
        return list(getattr(self.examples, "source_names", ()))

    def members(self, index: int) -> list[int]:
        """Return the other dataset's rows of a row, in their order within it."""
        row = options.row_index(index, len(self))
        found: list[int] = self._members[slice(*self._bounds[row : row + 2])].tolist()
        return found


class PackedDataset(GroupedRows):
    """A packed dataset: rows of `seq_len` tokens with several examples each.

    Row i is `({"input", "position_ids"}, labels)`, all int64 `[seq_len]`. `position_ids` restart at
    0 in each example and in the padding at the end, by which transformers' attention keeps them
    apart as long as there is no attention mask and no cache (`use_cache=False`). An epoch has every
    example once. Of examples with a `source` (a `Mixture` without ratios) there is that of each
    token, `source` `[seq_len]`; of examples with images their paths, `images`.

    Args:
        examples: Dataset of the examples, with `lengths`.
        seq_len: Length of a row, in tokens.
        pad_id: Id of the padding; None: 0.
        ignore_index: Label of the padding, excluded from the loss.
        seed: Seed of the packing; the loader shuffles the rows.
        truncation: Examples of more than `seq_len` tokens are an `error`, are truncated (`cut`), or
            left out (`drop`).

    Raises:
        ValueError: Examples that do not fit a row, no example is left, or a mixture with ratios.
    """

    @staticmethod
    def validate(*, seq_len: int = 1, truncation: str = "error") -> None:
        """Raise `ValueError` for an option out of range."""
        options.at_least(1, seq_len=seq_len)
        options.one_of(_TRUNCATION, truncation=truncation)

    def __init__(
        self,
        examples: RaggedRows,
        seq_len: int,
        *,
        pad_id: int | None = None,
        ignore_index: int = -100,
        seed: int = 0,
        truncation: str = "error",
    ) -> None:
        self.validate(seq_len=seq_len, truncation=truncation)
        options.without_ratios(examples, "packed rows")
        self.examples, self.seq_len = examples, seq_len
        self.pad_id, self.ignore_index = pad_id or 0, ignore_index
        lengths = np.asarray(examples.lengths)
        too_long = int((lengths > seq_len).sum())
        if too_long and truncation == "error":
            raise ValueError(
                f"{too_long} of {len(lengths)} examples do not fit a row of seq_len={seq_len} (the "
                f"longest has {lengths.max()} tokens): raise seq_len, cut examples with "
                f"max_tokens={seq_len}, or give truncation=cut or truncation=drop"
            )
        chosen = np.flatnonzero((lengths <= seq_len) | (truncation == "cut"))
        lengths = np.minimum(lengths, seq_len)
        packs = best_fit_decreasing(lengths[chosen], seq_len, seed)
        options.require(bool(packs), f"no example fits a row of seq_len={seq_len}")
        self._bounds = np.cumsum([0, *map(len, packs)])
        self._members = chosen[np.fromiter((i for pack in packs for i in pack), np.int64)]
        filled = np.add.reduceat(lengths[self._members], self._bounds[:-1])
        #: Fraction of the tokens that are not padding.
        self.efficiency = float(filled.sum()) / (len(packs) * seq_len)
        #: Number of positions in use: of the longest example, or of the longest padding.
        self.longest = int(max(lengths[chosen].max(), seq_len - filled.min()))
        log.info(
            "packed %d examples into %d rows of %d tokens: %.1f %% of the tokens are real",
            *(len(chosen), len(packs), seq_len, 100 * self.efficiency),
        )

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Tensor]:
        at = 0
        ids = torch.full((self.seq_len,), self.pad_id)
        labels = torch.full((self.seq_len,), self.ignore_index)
        positions = torch.empty(self.seq_len, dtype=torch.int64)
        sources = torch.zeros(self.seq_len, dtype=torch.int64)
        images: list[str] = []
        for member in self.members(index):
            inputs, targets = self.examples[member]
            end = min(at + len(targets), self.seq_len)
            ids[at:end], labels[at:end] = inputs["input"][: end - at], targets[: end - at]
            positions[at:end] = torch.arange(end - at)
            sources[at:end] = inputs.get("source", 0)
            images += inputs.get("images", [])
            at = end
        positions[at:] = torch.arange(self.seq_len - at)
        row: dict[str, Any] = {"input": ids, "position_ids": positions}
        row |= {"source": sources} if self.source_names else {}
        return row | ({"images": images} if images else {}), labels

    def fingerprint(self) -> str | None:
        """Return a digest of the examples and the packing; None if the examples have none."""
        layout = (self._bounds, self._members)
        settings = f"{self.seq_len} {self.pad_id} {self.ignore_index}"
        return fingerprint_with(self.examples, settings, *(a.tobytes() for a in layout))
