import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditty_di.data import Loader, PackedCollate, PackedDataset, training_steps
from ditty_di.data.packing import best_fit_decreasing


class Ragged:
    """Example i is the token i, `lengths[i]` times."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = torch.full((int(self.lengths[index]),), index)
        return {"input": ids}, ids


LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=60)


@given(LENGTHS, st.integers(0, 2**64))
def test_every_example_once_and_no_row_too_full(lengths, seed):
    packs = best_fit_decreasing(np.array(lengths), 16, seed)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(sizes) <= 16
    assert sum(size <= 8 for size in sizes) <= 1, "two such rows would have been one"


@given(LENGTHS)
def test_each_goes_where_the_least_room_is_left(lengths):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 16) - length)
    packs = best_fit_decreasing(np.array(lengths), 16)
    assert sorted(16 - sum(lengths[i] for i in pack) for pack in packs) == sorted(rooms)


def test_the_packs_never_change_between_versions():
    """A run that was saved must resume: these rows are for ever."""
    assert best_fit_decreasing(np.array([5, 3, 5, 2, 8, 3]), 8, seed=3) == PACKS
    seeds = [str(best_fit_decreasing(np.ones(40, int), 8, seed)) for seed in range(3)]
    assert len(set(seeds)) == 3, "who shares a row is drawn"


PACKS = [[4], [0, 5], [2, 1], [3]]


def test_a_row_is_its_examples_and_then_padding(caplog):
    with caplog.at_level(logging.INFO):
        dataset = PackedDataset(Ragged([3, 2, 4]), 6, pad_id=9)
    assert "packed 3 examples into 2 rows of 6 tokens: 75.0 % of the tokens are real" in caplog.text
    rows = [dataset[i] for i in range(len(dataset))]
    assert rows[0][0]["input"].tolist() == rows[0][1].tolist() == [2, 2, 2, 2, 1, 1]
    assert rows[0][0]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    assert rows[1][0]["input"].tolist() == [0, 0, 0, 9, 9, 9]
    assert rows[1][1].tolist() == [0, 0, 0, -100, -100, -100]
    assert rows[1][0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2], "the padding is apart"
    assert dataset.members(-1) == [0]
    with pytest.raises(IndexError):
        dataset[2]


def test_examples_that_are_too_long_are_an_error_or_cut_or_dropped():
    ragged = Ragged([3, 9, 7])
    with pytest.raises(ValueError, match=r"2 of 3 examples do not fit .*seq_len=6 .*longest has 9"):
        PackedDataset(ragged, 6)
    cut = PackedDataset(ragged, 6, truncation="cut")
    assert sorted(row["input"].tolist() for row, _ in map(cut.__getitem__, range(3)))[1:] == [
        [1] * 6,
        [2] * 6,
    ]
    dropped = PackedDataset(ragged, 6, truncation="drop")
    assert [dropped.members(i) for i in range(len(dropped))] == [[0]]
    with pytest.raises(ValueError, match="no example fits"):
        PackedDataset(Ragged([9]), 6, truncation="drop")
    with pytest.raises(ValueError, match="truncation='ignore' must be one of error, cut, drop"):
        PackedDataset(ragged, 6, truncation="ignore")
    with pytest.raises(ValueError, match="seq_len=0"):
        PackedDataset(ragged, 0)


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (2, 2), (3, 1)])
def test_an_epoch_holds_every_example_once_on_any_layout_and_resumes(batch_size, world):
    ragged = Ragged(np.random.default_rng(0).integers(1, 17, 50))
    dataset = PackedDataset(ragged, 16)

    def stream(skip, size=batch_size):
        found = []
        for step in range(skip, -(-len(dataset) // (size * world))):
            for rank in range(world):
                loader = Loader(
                    dataset,
                    size,
                    epochs=1,
                    collate_fn=PackedCollate(),
                    dp_rank=rank,
                    dp_world_size=world,
                )
                loader.load_state_dict({**loader.state_dict(), "consumed": step * size * world})
                found.append(next(iter(loader))[1])
        return torch.cat(found)

    labels = stream(0)
    counts = torch.bincount(labels[labels >= 0], minlength=50)
    assert counts.tolist() == ragged.lengths.tolist()
    assert torch.equal(labels[2 * batch_size * world :], stream(2))


def test_epochs_are_counted_in_packs():
    dataset = PackedDataset(Ragged([4] * 40), 16)
    assert len(dataset) == 10
    assert training_steps(epochs=2, dataset=dataset, global_batch_size=4) == 5
