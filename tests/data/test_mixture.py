"""Mixtures: the ratios at any prefix, each source's epochs, and resumes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.batch import Batch
from ditty_di.data import KeyedSampler, Loader, Mixture
from ditty_di.data.sampling.keyed import STORED_ROWS
from ditty_di.data.sampling.schedule import Schedule, chairman_assignment, period_of


class Numbers:
    """Rows of one number, in a form that loaders take."""

    def __init__(self, rows, base=0, form="pair"):
        self.rows, self.base, self.form = rows, base, form

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        value = torch.tensor([self.base + index])
        if self.form == "dict":
            return {"input": value, "labels": value}
        return (value, value) if self.form == "tensor" else ({"input": value}, value)


def worst_deviation(sources, stages):
    """The largest distance, at any prefix, from the ideal number of rows of a source."""
    names = [*stages[0]]
    share = np.zeros((len(sources), len(names)))
    for first, last in pairwise([*stages, len(sources)]):
        ratios = np.array([float(stages[first][name]) for name in names])
        share[first:last] = ratios / ratios.sum()
    taken = (sources[:, None] == np.arange(len(names))).cumsum(0)
    return float(np.abs(taken - share.cumsum(0)).max())


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any))
def test_each_prefix_has_its_share_to_less_than_one_row(counts):
    order = chairman_assignment(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    assert worst_deviation(order, {0: dict(enumerate(counts))}) < 1


def test_one_large_source_and_many_small_ones():
    # Where taking the largest deficit first is 1.7 rows off.
    counts = [100, *[1] * 100]
    assert worst_deviation(chairman_assignment(counts), {0: dict(enumerate(counts))}) < 1


def test_ratios_are_read_as_they_are_written():
    assert period_of({"a": 0.7, "b": 0.2, "c": 0.1}) == {"a": 7, "b": 2, "c": 1}
    assert period_of({"a": 3, "b": "1.5", "c": 0}) == {"a": 2, "b": 1, "c": 0}
    with pytest.raises(ValueError, match=r"repeat after 100000000003 rows.*round them"):
        period_of({"a": "0.00000000003", "b": 1})
    with pytest.raises(ValueError, match="b is below 0"):
        period_of({"a": 1, "b": -1})
    with pytest.raises(ValueError, match="one must be above 0"):
        period_of({"a": 0})


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 4))
def test_a_curriculum_has_its_share_at_each_prefix_and_any_position_is_computed(data, sources):
    ratio = st.sampled_from([0, 0.1, 0.25, 0.3, 1, 2])
    ratios = st.lists(ratio, min_size=sources, max_size=sources).filter(any)
    stages = data.draw(
        st.dictionaries(st.integers(1, 300), ratios.map(lambda r: dict(enumerate(r))))
    )
    stages = {0: dict(enumerate(data.draw(ratios))), **dict(sorted(stages.items()))}
    schedule = Schedule(stages)
    source, row = schedule.at(np.arange(2000))
    held = dict(zip(schedule.begins, stages.values(), strict=True))
    assert worst_deviation(source, held) < 1
    for wanted, begins, stage in zip(
        stages, schedule.begins, [None, *schedule.stages], strict=False
    ):
        assert begins <= max([wanted, *stages]) + sum(s.length for s in schedule.stages)
        assert stage is None or begins >= wanted or begins == schedule.begins[0]
    for number in range(sources):
        assert row[source == number].tolist() == [*range((source == number).sum())]
    position = data.draw(st.integers(0, 1999))
    assert schedule.rows_before(position) == {
        number: int((source[:position] == number).sum()) for number in range(sources)
    }
    again = schedule.at(np.array([position]))
    assert (source[position], row[position]) == (again[0][0], again[1][0])


def mixture(ratios, sizes=(70, 9, 31), **options):
    names = ["web", "code", "math"][: len(sizes)]
    sources = {
        n: Numbers(rows, 1000 * i) for i, (n, rows) in enumerate(zip(names, sizes, strict=True))
    }
    return Mixture(sources, ratios, **options)


def read(dataset, ranks, batch, start=None, count=None, **options):
    """Labels in the global order over all ranks, and the state after `count` micro-batches."""
    loaders = [
        Loader(dataset, batch, seed=3, dp_rank=rank, dp_world_size=ranks, **options)
        for rank in range(ranks)
    ]
    for loader in loaders if start else ():
        loader.load_state_dict(start)
    found = []
    for number, batches in enumerate(zip(*map(iter, loaders), strict=False), 1):
        found += [int(v) for _, labels in batches for v in labels.flatten() if v != -100]
        if number == count:
            break
    return found, loaders[0].state_dict()


RATIOS = {"web": 0.7, "code": 0.2, "math": 0.1}


def test_a_mixture_has_its_ratios_and_each_source_its_epochs():
    found = np.array(read(mixture(RATIOS), 2, 4, count=100)[0])
    kinds = found // 1000
    assert worst_deviation(kinds, {0: RATIOS}) < 1
    code = found[kinds == 1] - 1000
    assert len(code) == 160
    epochs = [code[at : at + 9].tolist() for at in range(0, 153, 9)]
    assert all(sorted(epoch) == [*range(9)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 15, "each epoch in its own order"


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    ratios=st.none() | st.lists(st.sampled_from(["0.1", "0.5", "1", "3"]), min_size=3, max_size=3),
    layouts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=3, max_size=3),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    step=st.none() | st.integers(0, 9),
)
def test_a_resume_on_other_layouts_twice_is_the_uninterrupted_order(
    sizes, ratios, layouts, counts, step
):
    names = dict(zip(["web", "code", "math"], ratios, strict=True)) if ratios else None
    later = None
    if names and step:
        later = {step: {"web": 1, "code": 1, "math": 2}}
    data = mixture(names, sizes, curriculum=later, global_batch_size=4)
    whole, _ = read(data, 1, 20, count=25)
    found, state = read(data, *layouts[0], count=counts[0])
    more, state = read(data, *layouts[1], start=state, count=counts[1])
    rest, _ = read(data, *layouts[2], start=state, count=5)
    found += more + rest
    assert found == whole[: len(found)]


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    ranks=st.integers(1, 4),
    batch=st.integers(1, 6),
    ratios=st.booleans(),
)
def test_every_row_once_an_epoch_over_all_ranks(sizes, ranks, batch, ratios):
    """Without ratios in the loader's epochs, and with ratios equal to the sizes."""
    names = ["web", "code", "math"][: len(sizes)]
    data = mixture(dict(zip(names, sizes, strict=True)) if ratios else None, sizes)
    found, _ = read(data, ranks, batch, epochs=1)
    every = [1000 * i + row for i, rows in enumerate(sizes) for row in range(rows)]
    assert sorted(found) == every


def test_workers_change_nothing():
    whole, _ = read(mixture(RATIOS), 1, 4, count=30)
    assert read(mixture(RATIOS), 1, 4, count=30, num_workers=2)[0] == whole


def test_other_ratios_are_another_order():
    _, state = read(mixture(RATIOS), 1, 4, count=3)
    later = mixture(RATIOS, curriculum={5: {**RATIOS, "math": 0}}, global_batch_size=4)
    for other in (mixture({**RATIOS, "math": 0.2}), later, mixture(None)):
        with pytest.raises(ValueError, match="rows come in another order"):
            read(other, 1, 4, start=state)
    # The same ratios, written in another way.
    read(mixture({"web": 7, "code": 2, "math": 1}), 1, 4, start=state, count=1)


@pytest.mark.parametrize("form", ["pair", "dict", "tensor"])
def test_a_row_says_its_source_and_the_model_does_not_get_it(form):
    data = Mixture(
        {"a": Numbers(3, form=form), "none": None, "b": Numbers(2, 10, form)}, {"a": 1, "b": 1}
    )
    loader = Loader(data, 2, seed=0)
    inputs, labels = next(iter(loader))
    assert inputs["source"].tolist() == (labels[:, 0] >= 10).long().tolist()
    batch = Batch.of((inputs, labels))
    assert batch.inputs.keys() == {"input"} and batch.context["source"] is inputs["source"]
    seen = {"epochs/a": 1 / 3, "epochs/b": 1 / 2, "rows/a": 1, "rows/b": 1}
    assert loader.get_metrics() == seen and loader.source_names == ["a", "b"]
    assert Loader(Numbers(3), 2).get_metrics() == {}


def test_without_ratios_large_mixtures_are_ordered_without_storing():
    assert mixture(None).sampler is None
    assert mixture(None, (STORED_ROWS, 5)).sampler is KeyedSampler


@pytest.mark.parametrize(
    ("ratios", "later", "said"),
    [
        ({"web": 0.5, "code": 0.5}, None, r"missing \['math'\]"),
        ({**RATIOS, "cod": 0.5}, None, r"unknown sources \['cod'\].*the sources are"),
        ({**RATIOS, "code": 0}, None, "code is never above 0; null leaves it out"),
        ({**RATIOS, "code": 0}, {5: {**RATIOS, "code": 0}}, "code is never above 0"),
        ({**RATIOS, "code": -1}, {5: RATIOS}, "code is below 0"),
        (RATIOS, {0: RATIOS}, "steps must be above 0"),
        (RATIOS, {5: {"web": 1}}, r"ratios at step 5: .*missing \['code', 'math'\]"),
        (None, {5: RATIOS}, "needs the ratios that hold before it"),
    ],
)
def test_ratios_that_cannot_be(ratios, later, said):
    with pytest.raises(ValueError, match=said):
        Loader(mixture(ratios, curriculum=later, global_batch_size=4), 2)


def test_a_curriculum_changes_the_ratios_at_its_step():
    data = mixture(
        {"web": 1, "code": 1, "math": 0},
        (90, 90, 90),
        curriculum={10: {"web": 0, "code": 1, "math": 3}},
        global_batch_size=4,
    )
    kinds = np.array(read(data, 2, 2, count=20)[0]) // 1000
    assert np.bincount(kinds[:40]).tolist() == [20, 20]
    assert np.bincount(kinds[40:]).tolist() == [0, 10, 30]


def test_what_else_cannot_be():
    with pytest.raises(ValueError, match="needs global_batch_size"):
        mixture(RATIOS, curriculum={1: RATIOS})
    with pytest.raises(ValueError, match=r"sources without rows: \['b'\]"):
        Mixture({"a": Numbers(3), "b": Numbers(0)})
    with pytest.raises(ValueError, match="sources without rows: all"):
        Mixture({"a": None})
