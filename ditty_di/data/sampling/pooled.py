"""The order of rows that are fetched shard by shard: shuffled within a pool of some shards."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from ditty_di.data import options
from ditty_di.data.sampling.keyed import KeyedPermutation, KeyedSampler
from ditty_di.data.sampling.sampler import Sampler


class ShardedRows(Protocol):
    """A dataset whose rows are numbered shard by shard, such as `Shards`."""

    shard_rows: np.ndarray
    """Number of rows of each shard, `[shards]`."""


class _Layout(NamedTuple):
    shards: np.ndarray  # in their order [shards]
    pool_ends: np.ndarray  # in rows [pools]


class PooledSampler(KeyedSampler):
    """A sampler that goes through a few shards at a time.

    In each epoch the shards come in another order, `pool` of them at a time, whose rows are
    shuffled together. So rows of at most two pools are needed at once, where an order over all rows
    would read another shard with nearly each row. Every row comes once an epoch, and any position
    is computed, as with `KeyedSampler`; without shuffling rows come in order.

    As a partial with `dataset` it is a value of the loader's `sampler`, and the default of remote
    shards.

    Args:
        rows: Number of rows of the dataset.
        seed: Seed of the order.
        shuffle: Shuffle each epoch.
        dataset: Has `shard_rows`. Its method `prepare_pool(pool, shards)`, if any, is called at the
            beginning, and with the next shards where a pool begins.
        pool: Number of shards whose rows are shuffled together.
        purpose: See `KeyedPermutation`.

    Raises:
        ValueError: A pool below 1, a dataset of another number of rows, or one whose cache does not
            hold a pool.
    """

    @staticmethod
    def validate(*, pool: int = 1) -> None:
        """Raise `ValueError` for an option out of range."""
        options.at_least(1, pool=pool)

    def __init__(
        self,
        rows: int,
        seed: int,
        shuffle: bool,
        *,
        dataset: ShardedRows,
        pool: int = 32,
        purpose: str = "",
    ) -> None:
        self.validate(pool=pool)
        super().__init__(rows, seed, shuffle, purpose=purpose)
        self.pool = pool
        self._sizes = np.asarray(dataset.shard_rows, np.int64)
        total = int(self._sizes.sum())
        options.require(total == rows, f"the shards have {total} rows, the dataset has {rows}")
        self._first = np.cumsum(self._sizes) - self._sizes
        self._layout = lru_cache(maxsize=3)(self._layout_of)
        self._in_pool = lru_cache(maxsize=4)(self._permutation_of_pool)
        self._prepare = getattr(dataset, "prepare_pool", None)
        self._prepared: tuple[int, int] | None = None
        if self._prepare is not None:
            self._prepare(pool)

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order; it is saved with a position."""
        order = f"pools of {self.pool} of {len(self._sizes)} shards 1"
        return {**super().identity(), "order": order}

    def rows_at(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Return the rows at some indices of an epoch, int64 `[indices]`."""
        if not self.shuffle:
            return indices
        found = np.empty(len(indices), np.int64)
        ends = self._layout(epoch).pool_ends
        pools = np.searchsorted(ends, indices, side="right")
        for pool in np.unique(pools).tolist():
            self._begin(epoch, pool)
            here = pools == pool
            start = ends[pool - 1] if pool else 0
            permutation, shard_ends, moves = self._in_pool(epoch, pool)
            rows = permutation(indices[here] - start)
            found[here] = rows + moves[np.searchsorted(shard_ends, rows, side="right")]
        return found

    def _layout_of(self, epoch: int) -> _Layout:
        key = f"{self.purpose} shards"
        order = KeyedPermutation(len(self._sizes), self.seed, epoch, key)
        shards = order(np.arange(len(self._sizes)))
        ends = np.cumsum(self._sizes[shards])
        return _Layout(shards, np.append(ends[self.pool - 1 :: self.pool], ends[-1:]))

    def _shards_of(self, epoch: int, pool: int) -> np.ndarray:
        return self._layout(epoch).shards[pool * self.pool : (pool + 1) * self.pool]

    def _permutation_of_pool(
        self, epoch: int, pool: int
    ) -> tuple[KeyedPermutation, np.ndarray, np.ndarray]:
        """Return the order, where each shard ends in the pool, and from there to the dataset."""
        shards = self._shards_of(epoch, pool)
        ends = np.cumsum(self._sizes[shards])
        moves = self._first[shards] - (ends - self._sizes[shards])
        key = f"{self.purpose} pool {pool}"
        return KeyedPermutation(int(ends[-1]), self.seed, epoch, key), ends, moves

    def _begin(self, epoch: int, pool: int) -> None:
        """Tell the dataset which shards come next, where a pool begins."""
        if self._prepare is None or self._prepared == (epoch, pool):
            return
        self._prepared = epoch, pool
        following = self._shards_of(epoch, pool + 1)
        if not len(following):
            following = self._shards_of(epoch + 1, 0)
        self._prepare(self.pool, [*self._shards_of(epoch, pool).tolist(), *following.tolist()])


def require_pools(dataset: Any, sampler: Sampler) -> None:
    """Refuse an order that reads shards all over a dataset which fetches them as they are read.

    Raises:
        ValueError: The dataset has a true `needs_pools`, and the sampler shuffles all its rows.
    """
    if getattr(dataset, "needs_pools", False) and sampler.shuffle:
        options.require(
            isinstance(sampler, PooledSampler),
            f"sampler: {type(sampler).__name__} shuffles all rows at once, so nearly each would be "
            "in another remote shard, which is fetched whole: leave the sampler out (remote shards "
            "take a PooledSampler), or copy the shards to this machine",
        )
