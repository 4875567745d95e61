"""The same training on every layout: gradients, losses, checkpoints and exports of one rank."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import ranks
from tests.parallelize.cells import SAVED_AT, serve
from tests.parallelize.matrix import (
    CELLS,
    LAYOUTS,
    REFUSED,
    RESUMED,
    VARIANTS,
    Cell,
    ranks_of,
    table,
)

ROOT = Path(__file__).parents[2]
Job = tuple[str, tuple[Any, ...]]

#: Model, layout of the checkpoint, layout that resumes it.
RESUMES = [(m, a, b) for m, layouts in RESUMED.items() for a in layouts for b in layouts]


def jobs(cells: list[Cell], resumes: list[Cell]) -> Iterator[tuple[int, list[Job]]]:
    """(ranks, jobs) of process groups that run one after another, for some of the tests."""
    several = sorted({layout.ranks for layout in LAYOUTS.values()})
    models = dict.fromkeys(model for model, _, _ in resumes)
    resumes = [*((m, "one", "one") for m in models), *(r for r in resumes if r[1:] != ("one",) * 2)]
    pairs = [*(c[:2] for c in cells if c not in REFUSED), *((m, "") for m in models)]

    def resumed(n: int) -> list[Job]:
        saved = dict.fromkeys((m, a) for m, a, _ in resumes if ranks_of(a) == n)
        here = [r for r in resumes if ranks_of(r[1]) <= n == ranks_of(r[2])]
        return [*(("save", one) for one in saved), *(("resume", r) for r in here)]

    yield 1, [*(("reference", pair) for pair in dict.fromkeys(pairs)), *resumed(1)]
    for n in several:
        yield n, [("compared", cell) for cell in cells if ranks_of(cell[2]) == n]
    for n in several:
        yield n, resumed(n)
    for n in (1, *several):
        yield n, [("resume", r) for r in resumes if ranks_of(r[1]) > n == ranks_of(r[2])]


class Found:
    """What jobs returned on rank 0. A process group runs when a test asks for one of its jobs."""

    def __init__(self, folder: str, groups: Iterator[tuple[int, list[Job]]]) -> None:
        self.folder, self.groups = folder, groups
        self.results: dict[Job, Any] = {}

    def __getitem__(self, job: Job) -> Any:
        while job not in self.results:
            n, wanted = next(self.groups)
            if wanted:
                returned = ranks.run(serve, n, self.folder, wanted, timeout=550)
                self.results.update(zip(wanted, returned[0], strict=True))
        return self.results[job]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[Found]:
    """The results that the selected tests look at."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    given = [item.callspec.params for item in mine if hasattr(item, "callspec")]
    cells = [p["cell"] for p in given if "cell" in p]
    resumes = [(p["model"], p["source"], p["layout"]) for p in given if "source" in p]
    with tempfile.TemporaryDirectory(dir=ranks.MEMORY) as folder:
        yield Found(folder, jobs(cells, resumes))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: ", ".join(filter(None, cell)))
def test_a_layout_gives_the_gradients_and_losses_of_one_rank(found: Found, cell: Cell):
    got = found["compared", cell]
    if cell in REFUSED:
        assert got == {"refused": REFUSED[cell]}
        return
    assert got.get("gradient", got) < 1e-4, got
    assert got["loss"] < 1e-5 and got["norm"] < 1e-4, got
    assert got["learned"] > 0.01, "it must have learned something"


@pytest.mark.parametrize("model, source, layout", RESUMES)
def test_a_checkpoint_is_resumed_and_exported_on_any_layout(found: Found, model, source, layout):
    got = found["resume", (model, source, layout)]
    assert got["steps"] == VARIANTS[""].steps - SAVED_AT
    assert got["loss"] < 1e-6, got
    assert got["names"] and got["weights"] < 1e-4, got


def test_the_readme_has_the_table():
    readme = (ROOT / "ditty_di" / "parallelize" / "README.md").read_text()
    assert table() in readme, "print it with python -m tests.parallelize.matrix"
