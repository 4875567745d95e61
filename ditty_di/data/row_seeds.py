"""The random numbers that rows draw: a function of the seed and the place in the stream alone."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

#: The number of a row that fills up an incomplete micro-batch.
FILLING = -1


def seed_generators(seed: int, place: int, purpose: str = "row") -> None:
    """Seed Python's, NumPy's and torch's global CPU generators of this process."""
    import torch

    digest = hashlib.blake2b(f"{seed} {place} {purpose}".encode(), digest_size=32).digest()
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(np.frombuffer(digest, "<u4", 4, 8))
    torch.default_generator.manual_seed(int.from_bytes(digest[24:], "little"))


class SeededRows:
    """A map-style dataset, read by micro-batches of pairs (place in the stream, row number).

    Each row is read with generators seeded by (`seed`, place), and the collation that follows in
    the same process finds them seeded by the first place: what they draw is the same with any
    number of workers, and after a resume. A dataset with `__getitems__` is seeded once a
    micro-batch. With `seed` None the generators are left alone. Row `FILLING` is None.
    """

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self.dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[Any]:
        many = getattr(self.dataset, "__getitems__", None)
        if many is not None and all(row != FILLING for _, row in pairs):
            self._seed_by(pairs[0][0])
            rows = list(many([row for _, row in pairs]))
        else:
            rows = [self._read(*pair) for pair in pairs]
        self._seed_by(pairs[0][0], "collation")
        return rows

    def _read(self, place: int, row: int) -> Any:
        if row == FILLING:
            return None
        self._seed_by(place)
        return self.dataset[row]

    def _seed_by(self, place: int, purpose: str = "row") -> None:
        if self._seed is not None:
            seed_generators(self._seed, place, purpose)


def draws(dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> bool:
    """Return whether reading or collating rows takes random numbers, as the first, the middle and
    the last row tell; the generators of this process are left as they were."""
    rows = len(dataset)
    with preserved_generators():
        before = _states()
        with contextlib.suppress(Exception):  # training tells what is wrong with them
            collate_fn([dataset[row] for row in sorted({0, rows // 2, rows - 1})])
        return _states() != before


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators go on afterwards as if nothing had happened."""
    import torch

    from ditty_di.metrics.validation import preserved_rng

    with preserved_rng(torch.device("cpu")):
        yield


def preserving(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches that are made without a trace in the generators of this process."""
    while True:
        with preserved_generators():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _states() -> tuple[Any, ...]:
    import torch

    numpy_state = pickle.dumps(np.random.get_state())
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()
