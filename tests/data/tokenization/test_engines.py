"""Other engines give the same bytes; a slot takes any object."""

from __future__ import annotations

from functools import partial

import pytest

from ditty_di.data.tokenization import Datatrove, Pool, Ray, TextFiles
from ditty_di.data.tokenization.engines import Step
from ditty_di.tasks.tokenize import tokenize
from tests.data.tokenization.conftest import content

SMALL = {"part_mb": 0.01, "report_mb": 0, "patience": 0}


class Backwards:
    """An engine of one's own: the last part first."""

    def mine(self, parts):
        return parts

    def run(self, work, parts):
        yield from map(work, reversed(parts))


class StepsOfTwo(Backwards):
    """What an executor of datatrove does with the step: a call for each task, in any order."""

    def run(self, work, parts):
        for rank in (1, 0):
            Step(work, parts)(None, rank=rank, world_size=2)
        yield from ()


def test_the_order_of_parts_and_who_does_them_changes_nothing(corpus, tokenizer, tmp_path):
    found = set()
    for i, engine in enumerate([Pool(1, rank=0, world=1), Backwards(), StepsOfTwo()]):
        folder = tmp_path / str(i)
        tokenize(tokenizer, str(folder), TextFiles(corpus), engine=engine, **SMALL)
        found.add(content(folder))
    assert len(found) == 1


@pytest.mark.slow
def test_datatrove_runs_the_parts(corpus, tokenizer, tmp_path):
    executor = pytest.importorskip("datatrove.executor")
    local = partial(
        executor.LocalPipelineExecutor, tasks=2, workers=1, logging_dir=str(tmp_path / "log")
    )
    for name, engine in (("one", Pool(1, rank=0, world=1)), ("two", Datatrove(local))):
        tokenize(tokenizer, str(tmp_path / name), TextFiles(corpus), engine=engine, **SMALL)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.slow
def test_ray_runs_the_parts(corpus, tokenizer, tmp_path):
    pytest.importorskip("ray")
    ray = Ray(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    for name, engine in (("one", Pool(1, rank=0, world=1)), ("two", ray)):
        tokenize(tokenizer, str(tmp_path / name), TextFiles(corpus), engine=engine, **SMALL)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"rank": 2, "world": 2}, "rank=2 must be below world=2"),
        ({"rank": 1}, "give rank and world"),
    ],
)
def test_bad_ranks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Pool(**options)
