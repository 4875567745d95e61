"""A classification and a model of two heads, as Python and as YAML."""

from __future__ import annotations

import ast
import json

import pytest
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import Graph
from ditty_di.contracts.check import examine
from ditty_di.contracts.from_config import stages
from tests.api.cases import ROOT, python

pytest.importorskip("sklearn")
EXPERIMENTS = ("classification", "two_heads")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_example_trains(name, tmp_path):
    file = ROOT / "examples" / f"{name}.py"
    result = ast.literal_eval(python(tmp_path, str(file)).splitlines()[-1])
    assert result["status"] == "finished"
    assert result.get("accuracy", 1.0) > 0.95
    assert result["objective"] < 0.7
    assert len(file.read_text().splitlines()) <= 55


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains(name, tmp_path):
    said = python(
        tmp_path, "-m", "ditty_di", f"+experiment={name}", "run=RUN", "hydra.verbose=false"
    )
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
    return examine(stages(Graph(config)))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiments_contracts_fit(name):
    assert not examined(f"experiment={name}").problems


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
    problems = examined("experiment=two_heads", change).problems
    assert any(said in str(problem) for problem in problems), problems
