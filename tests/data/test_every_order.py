"""What holds of every order of rows: each row once an epoch, whatever the layout."""

from functools import partial
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import (
    KeyedSampler,
    LengthGroupedSampler,
    Loader,
    Mixture,
    PaddedCollate,
    Sampler,
    WeightedSampler,
)
from tests.data.test_token_budget import Ragged


def random(mixture):
    return {"sampler": Sampler}


def sequential(mixture):
    return {"shuffle": False}


def keyed(mixture):
    return {"sampler": KeyedSampler}


def length_grouped(mixture):
    return {"sampler": partial(LengthGroupedSampler, dataset=mixture, group_size=3, sort_rows=7)}


def weighted(mixture):
    weights = 1 + np.arange(len(mixture)) % 3
    return {"sampler": partial(WeightedSampler, weights=weights, replacement=False)}


ORDERS = [random, sequential, keyed, length_grouped, weighted]


def rows_of(labels):
    return [int(row[0]) for row in labels if row[0] >= 0]


def steps_of(dataset, options, ranks, batch, accumulation):
    """The rows of each optimizer step, over all ranks and micro-batches."""
    loaders = [
        Loader(
            dataset, batch, seed=5, epochs=2, dp_rank=rank, dp_world_size=ranks,
            collate_fn=PaddedCollate(), **options,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    found = []
    streams = [iter(loader) for loader in loaders]
    while taken := [list(islice(stream, accumulation)) for stream in streams]:
        if not taken[0]:
            return found
        found.append([rows_of(labels) for of_rank in taken for _, labels in of_rank])
    return found


@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    ranks=st.integers(1, 3),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
)
def test_every_row_once_an_epoch_and_in_the_same_step(order, sizes, ranks, batch, accumulation):
    draw = np.random.default_rng(0)
    mixture = Mixture(
        {str(n): Ragged(draw.integers(1, 9, rows), 100 * n) for n, rows in enumerate(sizes)}
    )
    options = order(mixture)
    every = sorted(100 * n + row for n, rows in enumerate(sizes) for row in range(rows))
    steps = steps_of(mixture, options, ranks, batch, accumulation)
    rows = [row for step in steps for micro_batch in step for row in micro_batch]
    assert sorted(rows) == sorted(2 * every), "disjoint and covering, over ranks and steps"
    # A step has the same rows on one rank in one micro-batch.
    whole = steps_of(mixture, options, 1, ranks * batch * accumulation, 1)
    assert [sorted(chain(*step)) for step in steps] == [sorted(chain(*step)) for step in whole]
    stream = [row for step in whole for row in step[0]]
    assert sorted(stream[: len(every)]) == every, "the first epoch ends before the second"
    if order is sequential:
        assert stream == 2 * every
    elif len(every) > 12:
        assert stream[: len(every)] != stream[len(every) :], "each epoch in its own order"


@pytest.mark.parametrize("order", ORDERS)
def test_workers_change_nothing(order):
    mixture = Mixture({"a": Ragged([3, 1, 2]), "b": Ragged([5] * 6, 100)})
    options = order(mixture)
    workers = {**options, "num_workers": 2}
    assert steps_of(mixture, workers, 2, 2, 1) == steps_of(mixture, options, 2, 2, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_sources_are_counted_from_anywhere(order):
    mixture = Mixture({"a": Ragged([3, 1, 2]), "b": Ragged([5] * 4, 100)})
    options = order(mixture)
    positions = [0, 4, 5, 13, 13, 30, 6, 7]
    (loader,) = [Loader(mixture, 1, seed=5, collate_fn=PaddedCollate(), **options)]
    stream = [rows_of(labels)[0] for _, labels in islice(loader, 30)]
    for position in positions:
        seen = stream[:position]
        rows = {"a": sum(r < 100 for r in seen), "b": sum(r >= 100 for r in seen)}
        found = mixture.get_metrics(loader.sampler, position)
        assert found == {
            **{f"rows/{name}": n for name, n in rows.items()},
            "epochs/a": rows["a"] / 3,
            "epochs/b": rows["b"] / 4,
        }
    other = Loader(mixture, 1, seed=5, collate_fn=PaddedCollate(), **options)
    assert mixture.get_metrics(other.sampler, 30) == mixture.get_metrics(loader.sampler, 30)


def test_draws_with_replacement_are_counted_one_by_one():
    mixture = Mixture({"a": Ragged([3, 1, 2]), "b": Ragged([5] * 4, 100)})
    weights = [1.0] * 3 + [5.0] * 4
    loader = Loader(
        mixture, 1, collate_fn=PaddedCollate(), sampler=partial(WeightedSampler, weights=weights)
    )
    seen = [rows_of(labels)[0] >= 100 for _, labels in islice(loader, 300)]
    assert loader.get_metrics()["rows/b"] == sum(seen) > 230


def test_an_order_of_lengths_would_ignore_ratios():
    mixture = Mixture({"a": Ragged([3]), "b": Ragged([5], 100)}, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="rows grouped by length take each row of a mixture once"):
        Loader(mixture, 1, sampler=partial(LengthGroupedSampler, dataset=mixture))
    assert torch.equal(torch.from_numpy(mixture.lengths), torch.tensor([3, 5]))
