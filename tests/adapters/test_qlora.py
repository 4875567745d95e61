"""Adapters on plain and quantized bases: one rank or two, resumed or not, train alike."""

import pytest
import torch

from tests.adapters import cases
from tests.adapters.cases import RESUME_AT, RESUMED, STEPS, VARIANTS
from tests.checkpoint import ranks

TIMEOUT = 400


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Folder and values of every variant's whole run, by the number of ranks."""
    found = {}
    for n in (1, 2):
        folder = tmp_path_factory.mktemp(f"on-{n}")
        found[n] = folder, ranks.run(cases.whole_runs, n, folder, base, timeout=TIMEOUT)[0]
    return found


@pytest.fixture(scope="module")
def resumed(runs, base, tmp_path_factory):
    """Values of the runs that went on from (ranks before, ranks after)."""
    sources = [runs[1][0], runs[2][0]]
    found = {}
    for after in (1, 2):
        folder = tmp_path_factory.mktemp(f"resumed-on-{after}")
        from_one, from_two = ranks.run(
            cases.resumed_runs, after, folder, base, sources, timeout=TIMEOUT
        )[0]
        found[1, after], found[2, after] = from_one, from_two
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns(runs, variant):
    losses = runs[1][1][variant][:STEPS]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "lora"])  # it has dropout
def test_two_ranks_train_as_one(runs, variant):
    one, two = runs[1][1][variant], runs[2][1][variant]
    assert len(one) == STEPS + 1
    bound = 1e-4 if "bf16" not in variant else 2e-3  # bf16 rounds other partial sums otherwise
    torch.testing.assert_close(two[:STEPS], one[:STEPS], rtol=bound, atol=bound)


@pytest.mark.parametrize("variant", RESUMED)
@pytest.mark.parametrize("n", [1, 2])
def test_resumed_on_the_same_layout_it_is_bit_exact(runs, resumed, n, variant):
    assert resumed[n, n][variant] == runs[n][1][variant][RESUME_AT:]


@pytest.mark.parametrize("variant", ["qlora", "int8-dora"])
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_resumed_on_another_layout(runs, resumed, before, after, variant):
    here = resumed[before, after][variant][: STEPS - RESUME_AT]
    there = runs[before][1][variant][RESUME_AT:STEPS]
    torch.testing.assert_close(here[0], there[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
