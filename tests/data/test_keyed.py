"""The computed order: a permutation, as random as a stored one, at any position."""

import math
from bisect import bisect_left
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data.sampling.keyed import KeyedPermutation, KeyedSampler


def order(rows, seed=0, epoch=0, purpose=""):
    return KeyedPermutation(rows, seed, epoch, purpose)(np.arange(rows))


def test_small_orders_are_permutations():
    for rows in [*range(1, 130), 997, 65_536, 65_537]:
        assert np.array_equal(np.sort(order(rows, 7, 3)), np.arange(rows)), rows


@given(st.integers(1, 1 << 50), st.integers(0, 2**64), st.integers(0, 2**40), st.data())
def test_rows_of_huge_sets_are_in_range_and_differ(rows, seed, epoch, data):
    start = data.draw(st.integers(0, rows - 1))
    found = KeyedPermutation(rows, seed, epoch)(np.arange(start, min(rows, start + 50)))
    assert found.min() >= 0 and found.max() < rows and len(set(found.tolist())) == len(found)


def test_the_order_never_changes_between_versions():
    """A run that was saved must resume: these numbers are for ever."""
    assert order(8).tolist() == FIRST
    assert order(8, 1234, 5, "code").tolist() == SECOND
    assert KeyedPermutation(10**12, 1, 2)(np.arange(3)).tolist() == THIRD


FIRST = [5, 7, 6, 2, 0, 1, 4, 3]
SECOND = [0, 5, 2, 4, 6, 3, 7, 1]
THIRD = [49637924376, 882930767369, 395766874750]


def test_seeds_epochs_sizes_and_purposes_have_their_own_orders():
    found = [
        order(50, seed, epoch, purpose).tolist()
        for seed in range(4)
        for epoch in range(4)
        for purpose in ("", "web", "code")
    ]
    assert len(set(map(tuple, found))) == 48
    # No pair of a seed and an epoch is another pair, however their digits are cut.
    assert order(50, 1, 23).tolist() != order(50, 12, 3).tolist()


def longest_increasing(values):
    tails: list[int] = []
    for value in values.tolist():
        at = bisect_left(tails, value)
        tails[at : at + 1] = [value]
    return len(tails)


def cycles(values):
    seen, count = np.zeros(len(values), bool), 0
    for start in range(len(values)):
        count += not seen[start]
        while not seen[start]:
            seen[start] = True
            start = values[start]
    return count


def too_uneven(counts):
    """Whether chi-square is more than 5 standard deviations above its mean."""
    counts = np.asarray(counts, float).ravel()
    expected = counts.mean()
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return statistic > freedom + 5 * math.sqrt(2 * freedom)


def test_orders_are_as_random_as_a_shuffle():
    rows, trials, cells = 401, 400, 20
    grid, steps, across = np.zeros((cells, cells)), np.zeros(cells), np.zeros(cells)
    fixed, increasing, loops = [], [], []
    for seed in range(trials):
        first, second = order(rows, seed), order(rows, seed, 1)
        np.add.at(grid, (np.arange(rows) * cells // rows, first * cells // rows), 1)
        steps += np.bincount(np.diff(first) % rows * cells // rows, minlength=cells)
        across += np.bincount((first - second) % rows * cells // rows, minlength=cells)
        fixed.append((first == np.arange(rows)).sum())
        increasing.append(longest_increasing(first))
        loops.append(cycles(first))
    # A cell of 20 or 21 rows or columns has 5 % more of them than another: not random, but known.
    columns = np.bincount(np.arange(rows) * cells // rows)
    grid *= rows * rows / cells / cells / np.outer(columns, columns)
    assert not too_uneven(grid)
    assert not too_uneven(steps * rows / cells / columns)
    assert not too_uneven(across * rows / cells / columns)
    assert abs(np.mean(fixed) - 1) < 5 / math.sqrt(trials)
    harmonic = math.log(rows) + 0.5772
    spread = math.sqrt((harmonic - math.pi**2 / 6) / trials)
    assert abs(np.mean(loops) - harmonic) < 5 * spread
    shuffled = np.random.default_rng(0)
    usual = [longest_increasing(shuffled.permutation(rows)) for _ in range(trials)]
    spread = math.hypot(np.std(usual), np.std(increasing)) / math.sqrt(trials)
    assert abs(np.mean(increasing) - np.mean(usual)) < 5 * spread


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_all_orders_of_few_rows_are_equally_frequent(rows):
    # What fewer rounds fail: 8 rounds leave orders of 5 rows uneven.
    seen = Counter(tuple(order(rows, seed).tolist()) for seed in range(6_000))
    assert not too_uneven([seen[each] for each in permutations(range(rows))])


@settings(deadline=None)
@given(st.integers(1, 3000), st.booleans(), st.integers(0, 7000), st.integers(0, 3000))
def test_a_part_of_the_stream_is_what_lies_there(rows, shuffle, start, count):
    sampler = KeyedSampler(rows, 3, shuffle)
    epochs = range(start // rows, (start + count) // rows + 1)
    stream = np.concatenate([sampler.epoch(epoch) for epoch in epochs])
    first = start % rows
    assert sampler.between(start, start + count) == stream[first : first + count].tolist()
    assert sampler.between(start, start - 1) == []
    if not shuffle:
        assert stream[:rows].tolist() == [*range(rows)]


def test_a_position_is_one_in_this_order():
    assert KeyedSampler(9, 0, True).identity()["order"] == "keyed 1"
