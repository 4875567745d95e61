from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditty_di.data.sampling.sampler import LengthGroupedSampler, Sampler, permutation


@given(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(1, 200))
def test_an_epoch_is_a_permutation(seed, epoch, rows):
    assert sorted(permutation(seed, epoch, rows).tolist()) == list(range(rows))


def test_seeds_and_epochs_have_their_own_orders():
    orders = [permutation(seed, epoch, 50).tolist() for seed in range(5) for epoch in range(5)]
    assert len(set(map(tuple, orders))) == 25


def test_the_order_never_changes_between_versions():
    """A run that was saved must resume: these numbers are for ever."""
    assert permutation(0, 0, 8).tolist() == FIRST
    assert permutation(1234, 5, 8).tolist() == SECOND


FIRST = [0, 3, 7, 5, 1, 2, 6, 4]
SECOND = [3, 6, 5, 7, 2, 4, 1, 0]


@given(st.integers(1, 20), st.booleans(), st.integers(0, 100), st.integers(0, 100))
def test_a_part_of_the_stream_is_what_lies_there(rows, shuffle, start, count):
    order = Sampler(rows, 3, shuffle)
    stream = [
        row
        for epoch in range(200 // rows + 1)
        for row in (permutation(3, epoch, rows).tolist() if shuffle else range(rows))
    ]
    assert order.between(start, start + count) == stream[start : start + count]
    assert order.between(start, start - 1) == []


def grouped(lengths, seed=0, shuffle=True, **options):
    dataset = SimpleNamespace(lengths=np.array(lengths))
    return LengthGroupedSampler(len(lengths), seed, shuffle, dataset=dataset, **options)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=100),
    group_size=st.none() | st.integers(1, 9),
    sort_rows=st.integers(1, 40),
    shuffle=st.booleans(),
)
def test_a_grouped_epoch_is_a_permutation(lengths, group_size, sort_rows, shuffle):
    order = grouped(lengths, shuffle=shuffle, group_size=group_size, sort_rows=sort_rows)
    rows = len(lengths)
    first, second = order.between(0, rows), order.between(rows, 2 * rows)
    assert sorted(first) == sorted(second) == list(range(rows))
    assert order.between(rows // 2, rows) == first[rows // 2 :]


def test_rows_of_a_step_have_similar_lengths_and_steps_come_in_any_order():
    lengths = np.random.default_rng(0).integers(1, 1000, 1000)
    found = np.array(grouped(lengths, group_size=8, sort_rows=500).between(0, 1000))
    steps = lengths[found].reshape(-1, 8)
    assert np.ptp(steps, axis=1).mean() < 40 < np.ptp(lengths[:8])
    tops = steps.max(axis=1)
    assert (np.diff(tops) > 0).sum() > 40, "not from the longest to the shortest"
    again = np.array(grouped(lengths, group_size=8, sort_rows=500).between(1000, 2000))
    assert not np.array_equal(found, again), "each epoch in its own order"
    assert set(map(tuple, found.reshape(-1, 8))) != set(map(tuple, again.reshape(-1, 8)))


def test_the_grouped_order_never_changes_between_versions():
    order = grouped([5, 1, 9, 3, 7, 2, 8, 4], seed=7, group_size=2, sort_rows=4)
    assert order.between(0, 16) == GROUPED


def test_positions_in_another_grouping_are_told_apart():
    identities = [
        str(order.identity())
        for order in (
            Sampler(4, 0, True),
            grouped([1, 2, 3, 4]),
            grouped([1, 2, 3, 5]),
            grouped([1, 2, 3, 4], group_size=2),
            grouped([1, 2, 3, 4], sort_rows=2),
        )
    ]
    assert len(set(identities)) == 5


def test_bad_groupings():
    with pytest.raises(ValueError, match="group_size=0"):
        grouped([1, 2], group_size=0)
    with pytest.raises(ValueError, match="1 lengths for 2 rows"):
        LengthGroupedSampler(2, 0, True, dataset=SimpleNamespace(lengths=np.array([1])))


GROUPED = [5, 1, 4, 3, 2, 6, 0, 7, 7, 1, 3, 5, 6, 4, 2, 0]
