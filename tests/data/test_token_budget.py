"""Micro-batches by tokens: within the budget, every row once, the same on any layout."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import (
    Loader,
    Mixture,
    PackedDataset,
    PaddedCollate,
    PaddingFreeCollate,
    Seq2SeqCollate,
    TokenBudgetDataset,
    TokenizedSeq2SeqDataset,
)


class Ragged:
    """Row i is its number, `lengths[i]` times."""

    def __init__(self, lengths, base=0):
        self.lengths, self.base = np.array(lengths), base

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = torch.full((int(self.lengths[index]),), self.base + index)
        return {"input": ids}, ids


def read(dataset, ranks, start=None, count=None, **options):
    """Rows and padded tokens of the micro-batches in the global order, and the last state."""
    loaders = [
        Loader(
            dataset, 1, seed=3, dp_rank=rank, dp_world_size=ranks,
            **{"collate_fn": PaddedCollate()} | options,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for loader in loaders if start else ():
        loader.load_state_dict(json.loads(json.dumps(start)))
    found = []
    for step, batches in enumerate(zip(*map(iter, loaders), strict=False), 1):
        for inputs, labels in batches:
            rows = [int(row[row >= 0][0]) for row in labels if (row >= 0).any()]
            found += [(rows, inputs["input"].numel())] if rows else []
        if step == count:
            break
    return found, loaders[0].state_dict()


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any)


@settings(deadline=None, max_examples=50)
@given(
    lengths=LENGTHS,
    more=st.integers(0, 60),
    multiple=st.sampled_from([None, 1, 4, 8]),
    ranks=st.integers(1, 4),
    sources=st.integers(1, 3),
)
def test_every_row_once_an_epoch_and_no_micro_batch_over_the_budget(
    lengths, more, multiple, ranks, sources
):
    lengths = [max(1, n) for n in lengths]
    longest = -(-max(lengths) // (multiple or 1)) * (multiple or 1)
    budget = longest + more
    parts = [lengths[n::sources] for n in range(sources)]
    named = {str(n): Ragged(part, 100 * n) for n, part in enumerate(parts) if part}
    for examples in (Ragged(lengths), Mixture(named)):
        dataset = TokenBudgetDataset(examples, budget, pad_to_multiple_of=multiple)
        collate = PaddedCollate(pad_to_multiple_of=multiple)
        found, _ = read(dataset, ranks, epochs=2, collate_fn=collate)
        assert max(tokens for _, tokens in found) <= budget
        rows = [row for some, _ in found for row in some]
        every = sorted({row for row in rows})
        assert len(every) == len(lengths)
        epochs = found[: len(dataset)], found[len(dataset) :]
        assert all(sorted(r for some, _ in epoch for r in some) == every for epoch in epochs)
        # Nothing that would fit is left out: two neighbours together are over the budget.
        ordered = [dataset.members(n) for n in range(len(dataset))]
        for one, other in pairwise(ordered):
            top = max(examples.lengths[i] for i in one)
            assert -(-top // (multiple or 1)) * (multiple or 1) * (len(one) + 1) > budget, other


@settings(deadline=None, max_examples=30)
@given(
    lengths=LENGTHS,
    ranks=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_a_resume_on_other_ranks_twice_is_the_uninterrupted_order(lengths, ranks, counts):
    dataset = TokenBudgetDataset(Ragged([max(1, n) for n in lengths]), 40)
    whole, _ = read(dataset, 1, count=100)
    found, state = read(dataset, ranks[0], count=counts[0])
    more, state = read(dataset, ranks[1], start=state, count=counts[1])
    rest, _ = read(dataset, ranks[2], start=state, count=5)
    found += more + rest
    assert found == whole[: len(found)]


def test_workers_change_nothing():
    dataset = TokenBudgetDataset(Ragged(np.random.default_rng(0).integers(1, 30, 50)), 60)
    whole, _ = read(dataset, 1, epochs=1)
    assert read(dataset, 1, epochs=1, num_workers=2)[0] == whole


def test_there_is_little_padding_and_epochs_differ_in_order():
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    dataset = TokenBudgetDataset(Ragged(lengths), 2000)
    found, _ = read(dataset, 1, epochs=2)
    tokens = sum(tokens for _, tokens in found[: len(dataset)])
    assert lengths.sum() / tokens > 0.97
    orders = [[rows[0] for rows, _ in found[at : at + len(dataset)]] for at in (0, len(dataset))]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert sorted(orders[0], key=lambda i: -lengths[i]) != orders[0]


def test_equally_long_rows_are_put_together_by_the_seed():
    def members(seed):
        dataset = TokenBudgetDataset(Ragged([4] * 40), 16, seed=seed)
        return [dataset.members(n) for n in range(len(dataset))]

    assert members(0) == members(0) != members(1)
    digests = {
        TokenBudgetDataset(Fixed([4] * 40), n, seed=seed).fingerprint()
        for n, seed in ((16, 0), (16, 1), (20, 0))
    }
    assert len(digests) == 3 and TokenBudgetDataset(Ragged([4]), 4).fingerprint() is None


class Fixed(Ragged):
    def fingerprint(self):
        return "content"


def test_each_source_of_a_mixture_by_its_own_budget():
    # Ratios of micro-batches, and so about of tokens.
    mixture = Mixture(
        {
            "short": TokenBudgetDataset(Ragged([2] * 300), 20),
            "long": TokenBudgetDataset(Ragged([10] * 300, 1000), 20),
        },
        {"short": 1, "long": 3},
    )
    found, _ = read(mixture, 2, count=40)
    long = [rows[0] >= 1000 for rows, _ in found]
    assert len(found) == 80 and sum(long) == 60
    assert {len(rows) for rows, _ in found} == {2, 10}
    inputs, _ = next(iter(Loader(mixture, 1, collate_fn=PaddedCollate())))
    assert inputs["source"].tolist() == [1] * len(inputs["input"])


class Pairs(Ragged):
    """Inputs and outputs of `[rows, 2]` tokens, as `TokenizedDataset` stores them."""

    ignore_index = -100

    def __init__(self, sizes):
        super().__init__(sizes.sum(1) - 1)
        self.sizes, self._inputs = sizes, sizes[:, 0]

    def tokens_of(self, index):
        inputs, outputs = self.sizes[index].tolist()
        mask = np.arange(inputs + outputs) >= inputs
        return np.full(inputs + outputs, index), mask, inputs


def test_inputs_and_outputs_that_are_padded_apart():
    examples = Pairs(np.random.default_rng(0).integers(1, 9, (60, 2)))
    rows = TokenizedSeq2SeqDataset(examples)
    assert rows.part_lengths.tolist() == examples.sizes.tolist()
    for dataset in (rows, Mixture({"a": rows})):
        made = TokenBudgetDataset(dataset, 40)
        loader = Loader(made, 1, epochs=1, collate_fn=Seq2SeqCollate(0))
        sizes = [inputs["input"].numel() + labels.numel() for inputs, labels in loader]
        assert max(sizes) <= 40 and len(sizes) < 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"max_tokens": 8},
            r"1 of 3 rows alone have .* max_tokens=8 .*the longest 9: raise",
        ),
        ({"max_tokens": 11, "pad_to_multiple_of": 4}, "max_tokens=11 .*the longest 12"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": 9, "pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be at least 1"),
    ],
)
def test_budgets_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        TokenBudgetDataset(Ragged([3, 9, 1]), **options)


def test_a_loader_of_several_micro_batches_at_once_is_refused():
    loader = Loader(TokenBudgetDataset(Ragged([3, 9, 1]), 9), 2, collate_fn=PaddedCollate())
    with pytest.raises(ValueError, match=r"data.loader.micro_batch_size=1"):
        next(iter(loader))


def test_ratios_that_an_order_would_ignore_are_refused():
    mixture = Mixture({"a": Ragged([3]), "b": Ragged([4])}, {"a": 1, "b": 2})
    for make in (TokenBudgetDataset, PackedDataset):
        with pytest.raises(ValueError, match="whatever its ratios: leave the ratios out, or mix"):
            make(mixture, 9)
    make(Mixture(mixture.sources), 9)


def test_sources_of_rows_that_become_one():
    mixture = Mixture({"a": Ragged([3, 2]), "b": Ragged([4], 10)})
    rows = [mixture[i] for i in range(3)]
    inputs, _ = PaddingFreeCollate(varlen=False)([*rows, None])
    assert inputs["source"].tolist() == [[0] * 5 + [1] * 4]
    inputs, _ = PaddedCollate()([*rows, None])
    assert inputs["source"].tolist() == [0, 0, 1, 0]
    packed = PackedDataset(mixture, 10)
    ((inputs, labels),) = [packed[i] for i in range(len(packed))]
    assert packed.source_names == ["a", "b"]
    valid = labels >= 0
    assert torch.equal(inputs["source"][valid], (labels[valid] >= 10).long())
