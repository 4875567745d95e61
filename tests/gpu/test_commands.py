"""Commands on a GPU: the shipped experiments follow their losses on the CPU, and sweeps fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.same_numbers import EXPERIMENTS, SMALLER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 3
#: Experiments whose noise, or whose first values of small models, a GPU draws differently.
NOISY = ("diffusion", "flow_matching", "classification", "two_heads")


def ditty(*arguments: str, cwd: Path, gpu: bool = True) -> str:
    env = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(
        [sys.executable, "-m", "ditty_di", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_trains_as_on_the_cpu(experiment, tmp_path):
    options = [
        *(f"+experiment={experiment}", f"max_steps={STEPS}", "logger.log_interval=1"),
        *("launcher.nproc=1", *SMALLER.get(experiment, ())),
    ]
    ditty(*options, f"run={tmp_path / 'gpu'}", cwd=tmp_path)
    ditty(*options, f"run={tmp_path / 'cpu'}", cwd=tmp_path, gpu=False)
    found, expected = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=0.3 if experiment in NOISY else 0.02)
    result = json.loads((tmp_path / "gpu" / "result.json").read_text())
    assert result["status"] == "finished"


@pytest.mark.parametrize("experiment", ["lora", "pretrain"])
def test_a_run_resumes_to_the_bit(experiment, tmp_path):
    options = [f"+experiment={experiment}", "logger.log_interval=1", "+runtime.deterministic=true"]
    options += ["lr_scheduler=constant", "checkpoint.save_interval=3", "launcher.nproc=1"]
    ditty(*options, "max_steps=6", f"run={tmp_path / 'whole'}", cwd=tmp_path)
    for steps in (3, 6):
        ditty(*options, f"max_steps={steps}", f"run={tmp_path / 'again'}", cwd=tmp_path)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


def test_jobs_of_a_sweep_use_the_gpu(tmp_path):
    options = ["+experiment=pretrain", f"max_steps={STEPS}", "logger.log_interval=1"]
    ditty("--multirun", *options, "optimizer.lr=1e-3,1e-4", cwd=tmp_path)
    files = list(tmp_path.rglob("metrics.jsonl"))
    assert len(files) == 2
    for file in files:
        assert len(losses(file.parent)) == STEPS
