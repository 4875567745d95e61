import gc
import itertools
import json
import multiprocessing
import os
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import (
    LengthGroupedSampler,
    Loader,
    PaddedCollate,
    PaddingFreeCollate,
    training_steps,
)
from ditty_di.data.sampling.sampler import permutation


class Rows:
    """Row i is `({"input": [i]}, [i])`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        return {"input": torch.tensor([index])}, torch.tensor([index])


class WorkerFacts(Rows):
    """Rows that tell about the process that reads them."""

    def __getitem__(self, index):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        heeded = [signal.getsignal(s) != signal.SIG_IGN for s in (signal.SIGTERM, signal.SIGINT)]
        draws = torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])
        return {"input": draws}, torch.tensor([index, len(blocked), sum(heeded)])


class FloatRows(Rows):
    def __getitem__(self, index):
        return {"input": torch.tensor([index])}, torch.tensor([index / 2])


def read(loader):
    """Labels of the micro-batches `[micro-batch][row]`, with inputs that match."""
    batches = []
    for inputs, labels in loader:
        valid = labels != -100
        assert torch.equal(inputs["input"][valid], labels[valid])
        batches.append(labels.flatten().tolist())
    return batches


def global_stream(make, world):
    """The ranks' micro-batches in global order, and the rows in them without the filling."""
    ranks = [read(make(dp_rank=rank, dp_world_size=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "every rank yields equally many"
    steps = [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)]
    flat = list(itertools.chain(*steps))
    rows = [row for row in flat if row != -100]
    assert flat[: len(rows)] == rows, "filled up at the very end only"
    assert len(flat) - len(rows) < max(len(steps[-1]), 1) if steps else True
    return rows


SIZES = {
    "rows": st.integers(1, 40),
    "batch_size": st.integers(1, 5),
    "world": st.integers(1, 4),
    "seed": st.integers(0, 2**64),
}


@settings(deadline=None)
@given(**SIZES, epochs=st.integers(1, 3))
def test_every_row_once_an_epoch_on_any_layout(rows, batch_size, world, seed, epochs):
    def make(**rank):
        return Loader(Rows(rows), batch_size, seed=seed, epochs=epochs, **rank)

    expected = [row for epoch in range(epochs) for row in permutation(seed, epoch, rows)]
    assert global_stream(make, world) == expected
    assert len(make()) == -(-rows * epochs // batch_size) == len(read(make()))


@settings(deadline=None, max_examples=10)
@given(**SIZES, workers=st.integers(1, 2))
def test_workers_change_nothing(rows, batch_size, world, seed, workers):
    def make(**rank):
        return Loader(Rows(rows), batch_size, seed=seed, epochs=2, num_workers=workers, **rank)

    expected = [row for epoch in range(2) for row in permutation(seed, epoch, rows)]
    assert global_stream(make, world) == expected


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    before=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    after=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stop=st.integers(0, 30),
)
def test_resuming_anywhere_on_any_layout_gives_the_rest(rows, before, after, stop):
    states = []
    for rank in range(before[1]):
        loader = Loader(Rows(rows), before[0], epochs=2, dp_rank=rank, dp_world_size=before[1])
        for _ in zip(range(stop), loader, strict=False):
            pass
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert all(state == states[0] for state in states), "one state for all ranks"

    def make(**rank):
        loader = Loader(Rows(rows), after[0], epochs=2, **rank)
        loader.load_state_dict(states[0])
        assert loader.state_dict() == states[0], "also before the first batch"
        return loader

    expected = [row for epoch in range(2) for row in permutation(0, epoch, rows).tolist()]
    assert states[0]["consumed"] == min(stop * before[0] * before[1], 2 * rows)
    assert global_stream(make, after[1]) == expected[states[0]["consumed"] :]


def test_prefetched_micro_batches_are_not_consumed():
    loader = Loader(Rows(100), 3, num_workers=2, epochs=1)
    batches = iter(loader)
    seen = [next(batches) for _ in range(4)]
    assert loader.state_dict()["consumed"] == 12 and len(seen) == 4
    resumed = Loader(Rows(100), 7, num_workers=1, epochs=1)
    resumed.load_state_dict(loader.state_dict())
    rest = [row for batch in read(resumed) for row in batch if row != -100]
    assert rest == permutation(0, 0, 100)[12:].tolist()


def test_more_epochs_continue_a_finished_run():
    loader = Loader(Rows(5), 2, epochs=1)
    read(loader)
    assert loader.state_dict()["consumed"] == 5, "the filling is no row"
    longer = Loader(Rows(5), 5, epochs=2)
    longer.load_state_dict(loader.state_dict())
    assert read(longer) == [permutation(0, 1, 5).tolist()]


def test_only_the_next_iterator_resumes():
    loader = Loader(Rows(6), 2, epochs=1, shuffle=False)
    everything = [[0, 1], [2, 3], [4, 5]]
    assert read(loader) == read(loader) == everything
    loader.load_state_dict({**loader.state_dict(), "consumed": 2})
    assert read(loader) == everything[1:]
    assert read(loader) == everything


def test_epochs_differ_in_order():
    loader = Loader(Rows(30), 30, epochs=2)
    first, second = read(loader)
    assert first != second and sorted(first) == sorted(second)
    assert first != list(range(30))


def test_it_says_which_epoch_the_last_micro_batch_ends_in():
    loader = Loader(Rows(5), 2)
    seen = [loader.epoch for _ in zip(range(6), loader, strict=False)]
    assert seen == [0, 0, 1, 1, 1, 2], "rows 2, 4 | 6, 8, 10 | 12"
    resumed = Loader(Rows(5), 2)
    resumed.load_state_dict(loader.state_dict())
    next(iter(resumed))
    assert resumed.epoch == 2


def test_without_epochs_the_stream_never_ends():
    loader = Loader(Rows(3), 2)
    first = [labels.flatten().tolist() for _, labels in itertools.islice(loader, 300)]
    rows = list(itertools.chain(*first))
    assert all(sorted(rows[i : i + 3]) == [0, 1, 2] for i in range(0, 600, 3))
    with pytest.raises(TypeError, match="never ends"):
        len(loader)


def test_a_part_of_an_epoch():
    assert sum(map(len, read(Loader(Rows(30), 1, epochs=0.1)))) == 3
    assert len(Loader(Rows(30), 4, epochs=1.5)) == 12


def test_a_dataset_smaller_than_a_micro_batch():
    ranks = [
        Loader(Rows(1), 4, epochs=1, dp_rank=rank, dp_world_size=2, num_workers=rank)
        for rank in range(2)
    ]
    assert [read(rank) for rank in ranks] == [[[0, -100, -100, -100]], [[-100] * 4]]


def test_drop_last():
    loader = Loader(Rows(7), 3, epochs=1, shuffle=False, drop_last=True)
    assert read(loader) == [[0, 1, 2], [3, 4, 5]] and len(loader) == 2
    with pytest.raises(ValueError, match="drop_last leaves nothing: 7 rows"):
        Loader(Rows(7), 4, epochs=1, drop_last=True, dp_world_size=2)


@pytest.mark.parametrize("dp_rank", [0, 1])
def test_rows_whose_labels_cannot_be_filled_up_are_spread(dp_rank):
    rank = {"dp_rank": dp_rank, "dp_world_size": 2}
    assert len(list(Loader(FloatRows(9), 1, epochs=1, **rank))) == 5 - dp_rank
    assert len(list(Loader(FloatRows(8), 1, epochs=1, **rank))) == 4
    assert len(list(Loader(FloatRows(9), 1, epochs=1, drop_last=True, **rank))) == 4
    next(iter(Loader(FloatRows(9), 1, **rank)))

    def unsigned(rows):
        return {}, torch.zeros(len(rows), dtype=torch.uint8)

    assert len(list(Loader(Rows(9), 1, epochs=1, collate_fn=unsigned, **rank))) == 5 - dp_rank

    def packed(rows):
        return {}, torch.zeros(1, 5, dtype=torch.long)

    assert len(list(Loader(Rows(9), 2, epochs=1, collate_fn=lambda rows: packed(rows), **rank)))


class Ragged(Rows):
    """Row i is i + 1 labels i."""

    def __init__(self, rows):
        super().__init__(rows)
        self.lengths = np.arange(1, rows + 1)

    def __getitem__(self, index):
        ids = torch.full((index + 1,), index)
        return {"input": ids}, ids


RAGGED = (PaddedCollate(pad_id=5), PaddingFreeCollate(pad_id=5))


@pytest.mark.parametrize("collate", RAGGED)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("rows", "batch_size", "world"), [(7, 3, 2), (1, 2, 3), (6, 2, 1)])
def test_collates_that_fill_give_every_label_once(collate, workers, rows, batch_size, world):
    """Also where the labels of a micro-batch are one row, and a rank has nothing but filling."""
    seen = []
    for rank in range(world):
        loader = Loader(
            Ragged(rows),
            batch_size,
            epochs=1,
            collate_fn=collate,
            num_workers=workers,
            dp_rank=rank,
            dp_world_size=world,
        )
        batches = list(loader)
        assert len(batches) == len(loader) == -(-rows // (batch_size * world))
        for inputs, labels in batches:
            assert inputs["input"].shape == labels.shape
            valid = labels != -100
            assert torch.equal(inputs["input"][valid], labels[valid])
            seen += labels[valid].tolist()
    assert sorted(seen) == [i for i in range(rows) for _ in range(i + 1)]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40),
    before=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    after=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stop=st.integers(0, 20),
)
def test_grouped_rows_resume_on_any_layout(rows, before, after, stop):
    dataset = Ragged(rows)
    order = partial(LengthGroupedSampler, dataset=dataset, group_size=4, sort_rows=12)

    def stream(layout, state=None, limit=None):
        ranks = []
        for rank in range(layout[1]):
            loader = Loader(
                dataset,
                layout[0],
                epochs=2,
                collate_fn=PaddedCollate(),
                sampler=order,
                dp_rank=rank,
                dp_world_size=layout[1],
            )
            if state:
                loader.load_state_dict(state)
            batches = list(itertools.islice(iter(loader), limit))
            ranks.append([labels[:, 0].tolist() for _, labels in batches])
        flat = [row for step in zip(*ranks, strict=True) for part in step for row in part]
        return [row for row in flat if row != -100], loader.state_dict()

    everything, _ = stream((1, 1))
    first, state = stream(before, limit=stop)
    assert first == everything[: state["consumed"]]
    assert stream(after, state)[0] == everything[state["consumed"] :]


def test_a_position_in_another_grouping_is_refused():
    dataset = Ragged(10)
    plain = Loader(dataset, 2, collate_fn=PaddedCollate())
    order = partial(LengthGroupedSampler, dataset=dataset)
    grouped = Loader(dataset, 2, collate_fn=PaddedCollate(), sampler=order)
    with pytest.raises(ValueError, match=r"lacks \['grouping'\]"):
        grouped.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"saved with .*grouping=groups of 1024"):
        plain.load_state_dict(grouped.state_dict())
    grouped.load_state_dict(grouped.state_dict())


def test_filling_up_leaves_the_dataset_as_it_is():
    labels = torch.arange(3).unsqueeze(1)

    def view(rows):
        return rows[0][0], labels[rows[0][1].item()]

    read_labels = [
        batch[1].item()
        for batch in Loader(
            Rows(3), 1, epochs=1, shuffle=False, collate_fn=view, dp_rank=1, dp_world_size=2
        )
    ]
    assert read_labels == [1, -100] and labels.flatten().tolist() == [0, 1, 2]


def test_a_batch_that_is_no_pair_is_refused():
    with pytest.raises(TypeError, match=r"pair \(inputs, labels\), not a Tensor"):
        next(iter(Loader(Rows(9), 3, collate_fn=lambda rows: torch.zeros(3))))


def test_last_rows_name_what_was_yielded():
    whole = permutation(0, 0, 20).tolist()
    loader = Loader(Rows(20), 3, epochs=1, dp_rank=1, dp_world_size=2, num_workers=1)
    assert loader.last_rows(2) == []
    batches = iter(loader)
    next(batches)
    assert loader.last_rows(5) == whole[3:6]
    _, labels = next(batches)
    assert loader.last_rows() == labels.flatten().tolist() == whole[9:12]
    assert loader.last_rows(2) == whole[3:6] + whole[9:12]
    resumed = Loader(Rows(20), 2, epochs=1)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.last_rows(3) == []
    next(iter(resumed))
    assert resumed.last_rows(3) == whole[12:14]
    assert len(list(batches)) == 2 and loader.last_rows() == [], "filling is not named"


def rng_states():
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_untouched(workers):
    before = rng_states()
    read(Loader(Rows(20), 3, epochs=2, num_workers=workers))
    assert rng_states() == before


def draws(**arguments):
    loader = Loader(WorkerFacts(8), 1, epochs=1, num_workers=2, **arguments)
    return [tuple(inputs["input"].flatten().tolist()) for inputs, _ in loader]


def test_rows_draw_reproducible_numbers_of_their_own():
    base = draws()
    assert base == draws()
    ranks = [draws(dp_rank=rank, dp_world_size=65) for rank in (0, 64)]
    far = Loader(
        WorkerFacts(2), 1, num_workers=1, seed=2**70, dp_rank=10**9, dp_world_size=10**9 + 1
    )
    next(iter(far))
    seen = [*base, *draws(seed=1), ranks[1][0]]
    for generator in zip(*seen, strict=True):
        assert len(set(generator)) == len(seen), "no two places, ranks, seeds draw the same"


def drawn(loader):
    """What the rows of each micro-batch drew, by their place in the stream."""
    return [row for inputs, _ in loader for row in inputs["input"].tolist()]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_resume_draws_the_same_numbers_with_any_workers_and_batches(workers, batch_size):
    whole = drawn(Loader(WorkerFacts(8), 4, epochs=2))
    assert len({tuple(row) for row in whole}) == 16, "every row of every epoch draws its own"
    before = rng_states()
    loader = Loader(WorkerFacts(8), batch_size, epochs=2, num_workers=workers)
    loader.load_state_dict({**loader.state_dict(), "consumed": 6})
    assert drawn(loader)[:10] == whole[6:]
    assert rng_states() == before


class Whole(WorkerFacts):
    """Rows that are read a micro-batch at a time."""

    def __getitems__(self, indices):
        assert len(indices) == 2
        return [self[index] for index in indices]


def mask_some(rows):
    values, labels = zip(*rows, strict=True)
    mask = torch.rand(len(rows), 3) * np.random.random() + random.random()
    inputs = torch.stack([value["input"] for value in values]) + mask
    return {"input": inputs}, torch.stack(labels)


@pytest.mark.parametrize("dataset", [Rows(8), Whole(8)])
def test_a_resume_draws_the_same_numbers_in_collations_and_rows_read_together(dataset):
    def numbers(workers, consumed=0):
        loader = Loader(dataset, 2, epochs=2, num_workers=workers, collate_fn=mask_some)
        loader.load_state_dict({**loader.state_dict(), "consumed": consumed})
        return drawn(loader)

    whole = numbers(0)
    assert numbers(1) == whole and numbers(0, 6) == numbers(2, 6) == whole[6:]
    assert len(set(map(tuple, whole))) == 16


signal_newborn = False


def _signal_newborn():
    if signal_newborn:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)


os.register_at_fork(after_in_child=_signal_newborn)


def test_workers_ignore_stop_signals_from_birth(monkeypatch):
    """A preempted job's whole process group is signalled: the workers must go on to the save."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setitem(globals(), "signal_newborn", True)
    batches = iter(Loader(WorkerFacts(40), 2, epochs=1, num_workers=2))
    labels = [next(batches)[1]]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    labels = torch.cat(labels + [labels for _, labels in batches])
    assert labels[:, 0].tolist() == permutation(0, 0, 40).tolist()
    assert (labels[:, 1:] == 0).all(), "ignored, and no longer blocked"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "saved with seed=1, rows=10, shuffle=True, but this loader has seed=0"),
        ({"rows": 11}, "rows=11"),
        ({"shuffle": False}, "shuffle=False"),
        ({"consumed": None}, r"lacks \['consumed'\]"),
    ],
)
def test_a_position_in_another_order_is_refused(change, words):
    loader = Loader(Rows(10), 2)
    with pytest.raises(ValueError, match=words):
        loader.load_state_dict({**loader.state_dict(), **change})
    assert loader.state_dict()["consumed"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"dp_rank": 2, "dp_world_size": 2}, "dp_rank=2 must be .* below dp_world_size=2"),
        ({"dp_rank": -1}, "dp_rank=-1"),
        ({"epochs": 0}, "epochs=0 must be above 0"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"dataset": Rows(0)}, "the dataset has no rows"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        Loader(**{"dataset": Rows(3), "micro_batch_size": 1, **arguments})


@given(st.integers(1, 1000), st.integers(1, 20), st.integers(1, 50))
def test_the_number_of_steps_is_the_loaders_length(rows, epochs, batch):
    dataset = Rows(rows)
    steps = training_steps(epochs=epochs, dataset=dataset, global_batch_size=batch)
    assert steps == len(Loader(dataset, batch, epochs=epochs))


def test_the_number_of_steps_takes_exactly_one_of_max_steps_and_epochs():
    dataset = Rows(10)
    assert training_steps(max_steps=7, dataset=dataset) == 7
    assert training_steps(epochs=0.1, dataset=Rows(30), global_batch_size=1) == 3
    for both in ({}, {"max_steps": 1, "epochs": 1}):
        with pytest.raises(ValueError, match="exactly one of max_steps and epochs"):
            training_steps(dataset=dataset, global_batch_size=1, **both)
    with pytest.raises(ValueError, match="max_steps=0"):
        training_steps(max_steps=0, dataset=dataset)
    with pytest.raises(ValueError, match="global_batch_size=0"):
        training_steps(epochs=1, dataset=dataset, global_batch_size=0)
    with pytest.raises(ValueError, match="need a global_batch_size"):
        training_steps(epochs=1, dataset=dataset)


class Unwanted:
    """Garbage whose destructor tells which process collected it."""

    def __init__(self, told):
        self.told, self.itself = told, self

    def __del__(self):
        self.told.write_text(str(os.getpid()))


class Collecting(Rows):
    def __getitem__(self, index):
        gc.collect()
        return super().__getitem__(index)


def test_a_worker_collects_no_garbage_of_its_parent(tmp_path):
    """A process group's destructor would wait there for threads that it does not have."""
    gc.disable()
    try:
        Unwanted(tmp_path / "told")
        next(iter(Loader(Collecting(4), 2, num_workers=1)))
        assert not (tmp_path / "told").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "told").read_text() == str(os.getpid())
