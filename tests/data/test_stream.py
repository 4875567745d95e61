"""Streams: each example once a pass, the same rows on any layout, resumed exactly or refused."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import Streamed, StreamLoader, training_steps
from tests.data.streams import Numbers, NumbersInFiles, ranks, saved, take


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([Numbers, NumbersInFiles]),
    size=st.integers(6, 60),
    streams=st.sampled_from([1, 2, 6]),
    block=st.integers(1, 9),
    data=st.data(),
)
def test_resumed_twice_at_other_world_sizes_is_the_uninterrupted_order(
    kind, size, streams, block, data
):
    dataset = Streamed(kind(size), streams=streams, shuffle_rows=block)
    layout = st.tuples(
        st.sampled_from([n for n in (1, 2, 3, 6) if streams % n == 0]), st.integers(1, 4)
    )
    seen, state = [], None
    for steps in data.draw(st.lists(st.integers(0, 7), min_size=3, max_size=3)):
        world, batch = data.draw(layout)
        loaders = ranks(dataset, world, batch, state)
        for loader in loaders:
            assert state is None or loader.state_dict().items() <= state.items()
        seen += take(loaders, steps)
        state = saved(loaders)
        assert state["consumed"] == len(seen)
    whole = take(ranks(dataset, 1, 1), len(seen) + 3)
    assert seen == whole[: len(seen)]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([Numbers, NumbersInFiles]),
    size=st.integers(6, 60),
    streams=st.sampled_from([1, 2, 3, 6]),
    block=st.integers(1, 9),
)
def test_a_pass_has_each_example_once_and_is_shuffled_within_blocks(kind, size, streams, block):
    dataset = Streamed(kind(size), streams=streams, shuffle_rows=block)
    for stream in range(streams):
        opened = dataset.open(stream, 0)
        rows = [int(next(opened)[0]) for _ in range(4 * size)]
        own = [n for n in range(size) if n % streams == stream]
        endless = (own * (4 * size // len(own) + 2))[: 4 * size]
        for start in range(0, 4 * size - block, block):
            assert sorted(rows[start : start + block]) == sorted(endless[start : start + block])
        if block == 1:
            assert rows == endless
    if streams == 1 and size > 30 and block == 9:
        assert rows != endless


@pytest.mark.parametrize("streams, world, workers", [(6, 1, 2), (8, 2, 2), (4, 2, 2)])
def test_workers_change_nothing_and_each_has_its_own_streams(streams, world, workers):
    dataset = Streamed(Numbers(50), streams=streams, shuffle_rows=4)
    first = take(ranks(dataset, 1, 2), 30)
    loaders = ranks(dataset, world, 3, num_workers=workers)
    assert [loader.num_workers for loader in loaders] == [workers] * world
    steps = 30 // (3 * world)
    assert take(loaders, steps) == first[:30]
    state = saved(loaders)  # the workers have read ahead
    assert take(ranks(dataset, 1, 2, state), 10) == first[30:50]
    back = ranks(dataset, world, 1, state, num_workers=workers)
    assert take(back, 12 // world) == first[30:42]


def test_workers_are_as_many_as_divide_the_streams():
    dataset = Streamed(Numbers(50), streams=6)
    numbers = [StreamLoader(dataset, 2, num_workers=n).num_workers for n in range(8)]
    assert numbers == [0, 1, 2, 3, 3, 3, 6, 6]


def test_global_generators_are_untouched():
    class Drawing(Numbers):
        def __iter__(self):
            for row in super().__iter__():
                torch.rand(1), np.random.random()
                yield row

    torch.manual_seed(0)
    before = torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state())
    take(ranks(Streamed(Drawing(20), streams=2, shuffle_rows=3), 1, 2), 5)
    assert before == (torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()))


def test_a_state_that_is_not_exact_is_refused():
    class Forgetful(Numbers):
        def load_state_dict(self, state):
            pass

    with pytest.raises(ValueError, match="does not go on with the same example"):
        Streamed(Forgetful(50), streams=1).check()
    for short in (Numbers(1), Numbers(3), Numbers(5)):
        Streamed(short, streams=1).check()


def test_changed_data_are_found_by_a_resume():
    loader = StreamLoader(Streamed(Numbers(40), streams=2, shuffle_rows=4), 2)
    take([loader], 5)
    for changed in (Numbers(40, base=1), Numbers(4)):
        other = StreamLoader(Streamed(changed, streams=2, shuffle_rows=4), 2)
        other.load_state_dict(loader.state_dict())
        with pytest.raises(ValueError, match=r"stream \d does not go on with the example that it"):
            take([other], 1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "saved with seed=0, but this loader has seed=1"),
        ({"streams": 4}, "saved with streams=2, but this loader has streams=4"),
        ({"shuffle_rows": 5}, "shuffle_rows=4, but this loader has shuffle_rows=5"),
        ({"lost": True}, "position lacks stream-00001"),
    ],
)
def test_a_position_in_another_order_is_refused(change, words):
    def loader(streams=2, shuffle_rows=4, seed=0):
        dataset = Streamed(Numbers(40), streams=streams, shuffle_rows=shuffle_rows)
        return StreamLoader(dataset, 2, seed=seed)

    before = loader()
    take([before], 5)
    state = before.state_dict()
    if change.pop("lost", False):
        del state["stream-00001"]
    with pytest.raises(ValueError, match=words):
        loader(**change).load_state_dict(state)


def test_bad_arguments_are_refused():
    with pytest.raises(
        ValueError, match=r"streams=8 is not a multiple of the 3 data-parallel ranks"
    ):
        StreamLoader(Streamed(Numbers(9)), 1, dp_world_size=3)
    with pytest.raises(ValueError, match="a list has no state_dict"):
        Streamed([1, 2])
    with pytest.raises(ValueError, match="shuffle_rows=0 must be at least 1"):
        Streamed(Numbers(9), shuffle_rows=0)
    with pytest.raises(TypeError, match=r"no length .* train for max_steps, not for epochs"):
        training_steps(epochs=2, dataset=Streamed(Numbers(9)), global_batch_size=2)
    with pytest.raises(ValueError, match="stream 3 of 4 has no example; lower streams"):
        take(ranks(Streamed(Numbers(3), streams=4), 1, 4), 1)
