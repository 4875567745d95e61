"""A classification and a model of two heads, as Python and as YAML."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import Graph
from ditty_di.processors.configured import report

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("classification", "two_heads")


def run(folder, *command):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_example_trains(name, tmp_path):
    file = ROOT / "examples" / f"{name}.py"
    result = ast.literal_eval(run(tmp_path, str(file)).splitlines()[-1])
    assert result["status"] == "finished"
    assert result.get("accuracy", 1.0) > 0.95
    assert result["objective"] < 0.7
    assert len(file.read_text().splitlines()) <= 55


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains(name, tmp_path):
    said = run(tmp_path, "-m", "ditty_di", f"+experiment={name}", "run=RUN", "hydra.verbose=false")
    assert "go on" not in said and "task=generate" not in said, "it has no text"
    lines = [json.loads(x) for x in (tmp_path / "RUN" / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if "validation/loss" in line and line["step"] == 200]
    part = "classification_loss/" if name == "two_heads" else ""
    assert last[f"validation/{part}accuracy"] > 0.9
    assert (tmp_path / "RUN" / "export" / "model.safetensors").exists()
    if name == "two_heads":
        assert last["validation/mse_loss/mse"] < 0.15


def examined(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", [*overrides])
    config.run = "run"
    return report(Graph(config))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiments_contracts_fit(name):
    assert not examined(f"+experiment={name}").problems


@pytest.mark.parametrize(
    "change, said",
    [
        ("trainer.preprocessors=[]", "ctx.image"),
        ("trainer.preprocessors.0.key=picture", "ctx.image"),
        ("+data.train.contract='-> input:4:i64 | ctx.target:1:i64'", "i64"),
        ("+data.train.contract='-> input:4:f32 | ctx.target:1:f32'", "ctx.target"),
    ],
)
def test_what_breaks_the_two_heads_is_found_before_training(change, said):
    problems = examined("+experiment=two_heads", change).problems
    assert any(said in str(problem) for problem in problems), problems
