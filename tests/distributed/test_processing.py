"""Processors, composite losses, parameters of losses and callbacks do on two ranks what they do
on one."""

from __future__ import annotations

import math

import pytest

from tests.distributed.launch import launch
from tests.distributed.processing import NAMES

LAYOUTS = ("fsdp", "ddp")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch("processing", 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch("processing", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def rejected(tmp_path_factory):
    return launch("rejecting", 2, tmp_path_factory.mktemp("rejected"))


def same(a, b, tolerance, names=NAMES):
    for name in names:
        assert a[name] == pytest.approx(b[name], abs=tolerance, nan_ok=True), name


# -- losses ---------------------------------------------------------------------------------------


def test_a_window_in_one_micro_batch_or_in_three_gives_every_part_of_the_loss_alike(one):
    assert len(one["fsdp-composite-1"]["mse_loss/mse"]) == 6
    same(one["fsdp-composite-3"], one["fsdp-composite-1"], 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["composite", "uncertain"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_two_ranks_give_every_part_of_the_loss_as_one(one, two, layout, loss, micro_batches):
    name = f"{layout}-{loss}-{micro_batches}"
    same(two[name], one[name], 1e-5)
    objectives = [run[name]["result"]["objective"] for run in (one, two)]
    assert objectives[0] == pytest.approx(objectives[1], abs=1e-5)


@pytest.mark.parametrize("name", ["fsdp-uncertain-3", "ddp-uncertain-1", "fsdp-fused", "sharded"])
def test_parameters_of_a_loss_are_summed_over_ranks_and_clipped_with_the_model(one, two, name):
    (alone,), (together,) = one[name]["loss_weights"], two[name]["loss_weights"]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together != [pytest.approx(0.3)] * 2, "they were not trained"
    assert min(one[name]["grad_norm"]) > 0.5, "nothing was clipped"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_a_loss_are_resumed_bit_for_bit(one, two, layout):
    for run in (one, two):
        whole, again = run[f"{layout}-resumed"]
        assert again["loss"] == whole["loss"][3:]
        assert again["weights"] == whole["weights"]
        assert again["loss_weights"] == whole["loss_weights"]


# -- rejected batches -----------------------------------------------------------------------------


def test_what_one_rank_rejects_is_dropped_on_both(rejected):
    same(rejected["some"], rejected["without"], 1e-6)
    assert rejected["some"]["weights"] == pytest.approx(rejected["without"]["weights"], abs=1e-5)


def test_a_rejected_window_is_no_update_and_the_run_goes_on(rejected):
    losses = rejected["window"]["loss"]
    assert math.isnan(losses[1])
    assert [losses[0], losses[2]] == rejected["without window"]["loss"]
    assert rejected["window"]["weights"] == rejected["without window"]["weights"]


def test_both_ranks_count_what_was_rejected_and_nothing_is_skipped(rejected):
    for of_rank in rejected["results"]:
        some, without, window, *_ = of_rank
        counted = [result["rejected_batches"] for result in (some, without, window)]
        assert counted == [3, 0, 3]
        assert window["skipped_steps"] == 0 and window["status"] == "finished"


def test_a_rank_that_rejects_all_its_validation_data_waits_for_the_other(rejected):
    refused, lacking = (rejected[name]["result"] for name in ("refused", "lacking"))
    assert refused["objective"] == pytest.approx(lacking["objective"], abs=1e-6)


# -- callbacks ------------------------------------------------------------------------------------


def test_callbacks_come_in_their_order_at_the_same_moments_on_all_ranks(two):
    (first, result), (second, other) = two["callbacks"]
    assert first == second
    assert first[:2] == ["a on_train_start 0", "z on_train_start 0"]
    assert first[4:8] == [f"{n} {m} 2" for m in ("on_step_end", "on_validation_end") for n in "az"]
    assert first[-2:] == ["a on_train_end 6", "z on_train_end 6"]
    assert result["stopped"] == other["stopped"] is not None


def test_early_stopping_ends_all_ranks_after_its_patience(one, two):
    for calls, result in [*one["callbacks"], *two["callbacks"]]:
        # The validations of steps 4 and 6 are no better than that of step 2.
        assert (result["status"], result["step"]) == ("finished", 6)
        assert "of step 2, in 2 validations" in result["stopped"]
        assert "a on_save 6" not in calls  # there is no checkpointer


def test_a_run_is_pruned_on_all_ranks_though_one_compares(one, two):
    for result in [*one["pruned"], *two["pruned"]]:
        assert (result["status"], result["step"]) == ("pruned", 4)
        assert "not among the best 1 of 2 runs after 4 steps" in result["stopped"]


# -- pipelines ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    return [launch("piped", n, tmp_path_factory.mktemp(f"piped{n}")) for n in (1, 2)]


@pytest.mark.parametrize("case", ["plain", "rejecting"])
def test_a_pipeline_processes_as_one_rank_does(piped, case):
    alone, stages = (run[case] for run in piped)
    same(stages, alone, 1e-5, ("loss", "grad_norm", "cross_entropy_calculator/ce"))
    assert stages["loss_weights"][0] == pytest.approx(alone["loss_weights"][0], abs=1e-5)
    assert stages["loss_weights"] != [[0.0]]


def test_stages_draw_the_same_random_numbers_for_a_batch(piped):
    # The last stage's target is the first stage's input, so it can be learnt; other noise cannot.
    assert piped[1]["noisy"]["cross_entropy_calculator/ce"][-1] < 0.1
