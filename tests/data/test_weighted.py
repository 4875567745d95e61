"""Rows drawn with weights: as often as they weigh, the same on any layout."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import Loader, WeightedSampler
from ditty_di.data.sampling.weighted import _log
from tests.data.test_loader import Rows, read

WEIGHTS = [3.0, 0.0, 1.0, 0.5, 2.5, 0.0, 1.0]


def sampler(weights, seed=0, **options):
    return WeightedSampler(len(weights), seed, True, weights=weights, **options)


def off(counts, shares):
    """Chi-square in standard deviations above its mean."""
    expected = np.asarray(shares) / np.sum(shares) * np.sum(counts)
    freedom = len(expected) - 1
    statistic = ((np.asarray(counts) - expected) ** 2 / expected).sum()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_rows_come_as_often_as_they_weigh():
    found = sampler(WEIGHTS).between(0, 70_000)
    counts = np.bincount(found, minlength=7)
    assert counts[[1, 5]].tolist() == [0, 0]
    drawn = [0, 2, 3, 4, 6]
    assert off(counts[drawn], np.array(WEIGHTS)[drawn]) < 5
    # Each draw is independent of the one before.
    pairs = Counter(zip(found[::2], found[1::2], strict=True))
    both = [(a, b) for a in drawn for b in drawn]
    assert off([pairs[p] for p in both], [WEIGHTS[a] * WEIGHTS[b] for a, b in both]) < 5


def test_without_replacement_each_next_row_is_drawn_from_those_left():
    rounds, drawn = 30_000, [0, 2, 3, 4, 6]
    made = sampler(WEIGHTS, replacement=False, num_samples=2)
    found = np.array(made.between(0, 2 * rounds)).reshape(rounds, 2)
    assert (found[:, 0] != found[:, 1]).all()
    total = sum(WEIGHTS)
    pairs = Counter(map(tuple, found.tolist()))
    both = [(a, b) for a in drawn for b in drawn if a != b]
    shares = [WEIGHTS[a] / total * WEIGHTS[b] / (total - WEIGHTS[a]) for a, b in both]
    assert off([pairs[pair] for pair in both], shares) < 5
    assert sum(pairs.values()) == sum(pairs[pair] for pair in both)


@settings(deadline=None)
@given(
    weights=st.lists(st.sampled_from([0, 0.5, 1, 7]), min_size=1, max_size=30).filter(any),
    number=st.integers(1, 30),
    seed=st.integers(0, 2**64),
)
def test_a_round_without_replacement_has_no_row_twice(weights, number, seed):
    above = np.flatnonzero(weights).tolist()
    whole = sampler(weights, seed, replacement=False)
    assert sorted(whole.between(0, len(above))) == above
    assert whole.every_row_once == (len(above) == len(weights))
    number = min(number, len(above))
    some = sampler(weights, seed, replacement=False, num_samples=number)
    stream = some.between(0, 3 * number)
    for start in range(0, 3 * number, number):
        assert len(set(stream[start : start + number])) == number
    assert set(stream) <= set(above)
    assert stream[:number] == whole.between(0, len(above))[:number]


@settings(deadline=None, max_examples=30)
@given(
    replacement=st.booleans(),
    layouts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=3, max_size=3),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_a_resume_on_other_layouts_twice_is_the_uninterrupted_order(replacement, layouts, counts):
    made = sampler(WEIGHTS, 3, replacement=replacement)

    def rows(ranks, batch, count, start=None):
        loaders = [
            Loader(
                Rows(7), batch, seed=3, dp_rank=rank, dp_world_size=ranks,
                sampler=lambda rows, seed, shuffle: made,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        for loader in loaders if start else ():
            loader.load_state_dict(json.loads(json.dumps(start)))
        steps = zip(range(count), *map(iter, loaders), strict=False)
        found = [int(i) for _, *batches in steps for _, labels in batches for i in labels]
        return found, loaders[0].state_dict()

    found, state = rows(*layouts[0], counts[0])
    more, state = rows(*layouts[1], counts[1], state)
    rest, _ = rows(*layouts[2], 5, state)
    found += more + rest
    assert found == made.between(0, len(found))


def test_an_epoch_of_the_loader_is_as_many_draws_as_there_are_rows():
    loader = Loader(
        Rows(7), 2, epochs=1, sampler=lambda *given: WeightedSampler(*given, weights=WEIGHTS)
    )
    drawn = [row for batch in read(loader) for row in batch if row != -100]
    assert drawn == sampler(WEIGHTS).between(0, 7)


def test_the_draws_never_change_between_versions():
    """A run that was saved must resume: these numbers are for ever."""
    assert sampler(WEIGHTS, 7).between(0, 12) == WITH
    assert sampler(WEIGHTS, 7, replacement=False).between(0, 10) == WITHOUT


WITH = [3, 4, 6, 0, 4, 0, 0, 4, 0, 6, 4, 4]
WITHOUT = [4, 0, 2, 6, 3, 2, 0, 4, 6, 3]


def test_positions_in_other_draws_are_told_apart():
    other = [*WEIGHTS[:-1], 2.0]
    identities = {
        str(made.identity())
        for made in (
            sampler(WEIGHTS),
            sampler(WEIGHTS, 1),
            sampler(other),
            sampler(WEIGHTS, replacement=False),
            sampler(WEIGHTS, replacement=False, num_samples=2),
        )
    }
    assert len(identities) == 5


@given(st.floats(2.0**-53, 1.0))
def test_the_logarithm_is_one(x):
    assert _log(np.array([x]))[0] == pytest.approx(math.log(x), rel=4e-16, abs=1e-16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, r"weights: \[1\] of them for 2 rows"),
        ({"weights": [1.0, -1.0]}, "must be finite and not negative"),
        ({"weights": [1.0, math.nan]}, "must be finite and not negative"),
        ({"weights": [1.0, math.inf]}, "must be finite and not negative"),
        ({"weights": [0.0, 0.0]}, "one must be above 0"),
        ({"weights": [1.0, 1.0], "num_samples": 1}, "give replacement=false"),
        (
            {"weights": [1.0, 0.0], "num_samples": 2, "replacement": False},
            "num_samples=2 draws without replacement, but only 1 rows",
        ),
        (
            {"weights": [1.0, 1.0], "num_samples": 0, "replacement": False},
            "num_samples=0 must be at least 1",
        ),
    ],
)
def test_weights_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        WeightedSampler(2, 0, True, **options)
    with pytest.raises(ValueError, match="shuffle=false is refused"):
        WeightedSampler(2, 0, False, weights=[1.0, 1.0])
