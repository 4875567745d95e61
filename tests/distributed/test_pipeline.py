"""A pipeline of two stages trains like one rank: loss, gradient norm over stages, checkpoints."""

from __future__ import annotations

import shutil

import pytest

from tests.distributed.launch import launch


def test_a_pipeline_gives_the_losses_and_the_norms_of_one_rank_and_resumes_there(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    alone, piped = launch("pipelined", 1, one), launch("pipelined", 2, two)
    assert len(alone["loss"]) == 6
    assert piped["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    # Squares are summed over the stages, and the clipping uses the whole norm.
    assert piped["grad_norm"] == pytest.approx(alone["grad_norm"], abs=1e-5)
    assert min(alone["grad_norm"]) > 0.1, "nothing was clipped"

    shutil.rmtree(one / "checkpoints" / "step-00000006")
    shutil.rmtree(two / "checkpoints")
    shutil.copytree(one / "checkpoints", two / "checkpoints")
    resumed = launch("pipelined", 2, two)
    assert resumed["loss"] == pytest.approx(alone["loss"][3:], abs=1e-5)
