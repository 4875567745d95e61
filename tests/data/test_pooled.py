"""The order of rows that lie in shards: every row once, a few shards at a time, from anywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import KeyedSampler, Loader, PooledSampler, Sampler


class Sharded:
    """Rows of one number in shards; the shards that a sampler prepares are written down."""

    def __init__(self, sizes, needs_pools=False):
        self.shard_rows, self.needs_pools = np.array(sizes), needs_pools
        self.prepared = []

    def __len__(self):
        return int(self.shard_rows.sum())

    def __getitem__(self, index):
        return torch.tensor([index]), torch.tensor([index])

    def prepare_pool(self, pool, shards=()):
        self.prepared.append((pool, list(shards)))

    def shard_of(self, rows):
        return np.searchsorted(np.cumsum(self.shard_rows), rows, side="right")


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any)


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, pool=st.integers(1, 9), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_an_epoch_has_every_row_once_and_few_shards_at_a_time(sizes, pool, seed, epoch):
    dataset = Sharded(sizes)
    sampler = PooledSampler(len(dataset), seed, True, dataset=dataset, pool=pool)
    order = sampler.epoch(epoch)
    assert np.array_equal(np.sort(order), np.arange(len(dataset)))
    shards, left = dataset.shard_of(order), np.array(sizes)
    for shard in shards:
        left[shard] -= 1
        assert ((left > 0) & (left < sizes)).sum() <= pool  # begun and not at their end
    assert sampler.between(epoch * len(order), (epoch + 1) * len(order)) == order.tolist()


def test_pools_are_shuffled_inside_and_differ_by_epoch_and_seed():
    dataset = Sharded([50] * 8)

    def order(seed, epoch, pool=4):
        return PooledSampler(400, seed, True, dataset=dataset, pool=pool).epoch(epoch)

    first = order(0, 0)
    shards = dataset.shard_of(first)
    assert len({*shards[:200]}) == len({*shards[200:]}) == 4
    assert {*shards[:20]} == {*shards[:200]}  # not one shard after the other
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    firsts = {tuple(sorted({*dataset.shard_of(order(0, epoch))[:200]})) for epoch in range(9)}
    assert len(firsts) > 4  # other shards come together in another epoch
    assert {*order(0, 0, pool=100)} == {*range(400)}


def test_without_shuffling_rows_come_in_order():
    sampler = PooledSampler(9, 0, False, dataset=Sharded([4, 5]))
    assert sampler.between(0, 20) == [*range(9), *range(9), 0, 1]


def rows_of(loader, number=None):
    batches = iter(loader)
    return [[int(row) for row in next(batches)[0]["input"]] for _ in range(number or len(loader))]


@settings(max_examples=25, deadline=None)
@given(
    sizes=SIZES,
    pool=st.integers(1, 5),
    layouts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=3, max_size=3),
    stops=st.lists(st.integers(0, 6), min_size=2, max_size=2),
)
def test_a_resume_at_another_world_size_gives_the_rest(sizes, pool, layouts, stops):
    """Twice: the stream of all ranks is the uninterrupted one, each row once an epoch."""
    dataset = Sharded(sizes)

    def ranks(layout, state):
        world, batch = layout
        made = [
            Loader(
                dataset,
                batch,
                seed=3,
                sampler=lambda *a: PooledSampler(*a, dataset=dataset, pool=pool),
                dp_rank=rank,
                dp_world_size=world,
            )
            for rank in range(world)
        ]
        for loader in made:
            if state is not None:
                loader.load_state_dict(state)
        return made

    seen, state = [], None
    for layout, steps in zip(layouts, [*stops, 8], strict=True):
        loaders = ranks(layout, state)
        streams = [iter(loader) for loader in loaders]
        for _ in range(steps):
            for stream in streams:
                seen += next(stream)[0]["input"].flatten().tolist()
        state = loaders[0].state_dict()
    sampler = PooledSampler(len(dataset), 3, True, dataset=dataset, pool=pool)
    assert seen == sampler.between(0, len(seen))


def test_what_comes_next_is_prepared_where_a_pool_begins():
    dataset = Sharded([10] * 6)
    sampler = PooledSampler(60, 0, True, dataset=dataset, pool=4)
    assert dataset.prepared == [(4, [])]
    sampler.between(0, 10)
    order = sampler._layout(0).shards.tolist()
    following = sampler._layout(1).shards.tolist()
    # The block of 1,024 positions has the whole epoch.
    assert dataset.prepared[1:] == [(4, order), (4, [*order[4:], *following[:4]])]


def test_an_order_over_all_rows_of_remote_shards_is_refused():
    dataset = Sharded([10] * 6, needs_pools=True)
    for sampler in (Sampler, KeyedSampler):
        with pytest.raises(ValueError, match=rf"^sampler: {sampler.__name__} shuffles all rows"):
            Loader(dataset, 2, sampler=sampler)
    Loader(dataset, 2, sampler=Sampler, shuffle=False)
    Loader(dataset, 2, sampler=lambda *a: PooledSampler(*a, dataset=dataset))


def test_bad_arguments_and_other_orders_are_refused():
    dataset = Sharded([10] * 6)
    with pytest.raises(ValueError, match="pool=0 must be at least 1"):
        PooledSampler(60, 0, True, dataset=dataset, pool=0)
    with pytest.raises(ValueError, match="the shards have 60 rows, the dataset has 50"):
        PooledSampler(50, 0, True, dataset=dataset)

    def loader(pool):
        return Loader(dataset, 2, sampler=lambda *a: PooledSampler(*a, dataset=dataset, pool=pool))

    with pytest.raises(ValueError, match="order=pools of 3 of 6 shards 1, but this loader has"):
        loader(2).load_state_dict(loader(3).state_dict())
