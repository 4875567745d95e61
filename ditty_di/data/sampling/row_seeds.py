"""Random numbers of rows: a function of the seed and the position in the stream alone."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ditty_di.seed import preserved_rng

#: Row number of padding: a row that only completes the last micro-batch.
PADDING = -1


def seed_generators(seed: int, position: int, purpose: str = "row") -> None:
    """Seed Python's, NumPy's and torch's global CPU generators of this process."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=32).digest()
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(np.frombuffer(digest, "<u4", 4, 8))
    torch.default_generator.manual_seed(int.from_bytes(digest[24:], "little"))


class SeededRows:
    """A map-style dataset, read by micro-batches of pairs (position in the stream, row number).

    Each row is read with generators seeded by (`seed`, position). The collation that follows in the
    same process finds them seeded by the first position. So the random numbers are the same with
    any number of workers, and after a resume. A dataset with `__getitems__` is seeded once a
    micro-batch. Row `PADDING` is None.

    Args:
        dataset: The dataset.
        seed: Seed of the random numbers; None leaves the generators alone.
    """

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self.dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[Any]:
        many = getattr(self.dataset, "__getitems__", None)
        if many is not None and all(row != PADDING for _, row in pairs):
            self._seed_by(pairs[0][0])
            rows = list(many([row for _, row in pairs]))
        else:
            rows = [self._read(*pair) for pair in pairs]
        self._seed_by(pairs[0][0], "collation")
        return rows

    def _read(self, position: int, row: int) -> Any:
        if row == PADDING:
            return None
        self._seed_by(position)
        return self.dataset[row]

    def _seed_by(self, position: int, purpose: str = "row") -> None:
        if self._seed is not None:
            seed_generators(self._seed, position, purpose)


def draws(dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> bool:
    """Return whether reading or collating the first, middle and last row uses random numbers."""
    rows = len(dataset)
    with preserved_rng():
        before = _states()
        with contextlib.suppress(Exception):  # training reports what is wrong with them
            collate_fn([dataset[row] for row in sorted({0, rows // 2, rows - 1})])
        return _states() != before


def preserving(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches whose making leaves the generators of this process as they were."""
    while True:
        with preserved_rng():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _states() -> tuple[Any, ...]:
    numpy_state = pickle.dumps(np.random.get_state())
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()
