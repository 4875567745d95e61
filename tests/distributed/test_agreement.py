"""What one rank sees, all ranks act on: none is left behind in a collective."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return launch("agreement", 2, tmp_path_factory.mktemp("agreement"), timeout=120)


def test_a_model_that_brings_its_values_starts_as_rank_0s(seen):
    first, second = seen["start"]
    assert first == second


def test_nan_on_one_rank_stops_both_before_the_update(seen):
    first, second = seen["nan"]
    assert "step 3 is not finite" in first and "rank 0" in first
    assert "step 3 is not finite" in second and "rank 1" in second
    assert seen["nan_weights"] == [True, True]


def test_nan_on_one_rank_skips_the_step_of_both_whoever_decides(seen):
    by_device, by_host = seen["skipped"]
    assert by_device == by_host
    assert by_device[0] == by_device[1] and by_device[0][0] == 1


def test_a_rank_that_runs_dry_ends_the_training_of_both_with_a_save(seen):
    assert [(r["status"], r["step"]) for r in seen["uneven"]] == [("finished", 3)] * 2
    assert seen["uneven_saved"] == ["step-00000003"]


def test_a_partial_window_is_as_long_as_the_poorest_rank_has(seen):
    assert [(r["status"], r["step"]) for r in seen["uneven_accumulated"]] == [("finished", 2)] * 2


def test_a_signal_to_one_rank_stops_both_at_the_same_step(seen):
    assert [(r["status"], r["step"]) for r in seen["killed"]] == [("preempted", 3)] * 2
