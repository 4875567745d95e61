from __future__ import annotations

import pytest

from ditty_di.config import ConfigError, Graph
from ditty_di.processors.configured import check, report

STAGES = "tests.processors.test_stages"
CONFIG = {
    "key": "noise",
    "pre": {"_target_": f"{STAGES}.Made", "key": "${key}"},
    "parts": [[{"_target_": "ditty_di.losses.MSELoss", "target_key": "${pre.key}"}, 1.0]],
    "trainer": {
        "_target_": "ditty_di.Trainer",
        "dataloader": {"_target_": "torch.utils.data.DataLoader", "_partial_": True},
        "preprocessors": ["${pre}"],
        "model": {"_target_": f"{STAGES}.Net"},
        "loss_fn": {"_target_": "ditty_di.losses.CompositeLoss", "losses": "${parts}"},
    },
}


def changed(**changes):
    return Graph({**CONFIG, **changes})


def test_references_are_followed_and_nothing_is_built():
    found = report(changed())
    assert [str(p) for p in found.problems] == [
        # what the test's own Made writes has another rank than Net's logits
        "loss mse_loss: ctx.noise:n:f: needs rank 2 because of 0:n:f, but preprocessor made gives "
        "noise:1:f"
    ]
    assert [stage.key for stage in found.unchecked] == ["trainer.dataloader"]


def test_problems_name_key_and_line():
    graph = changed(parts=[[{"_target_": "ditty_di.losses.MSELoss", "target_key": "nois"}, 1.0]])
    graph.where = lambda key: f"somewhere.yaml:7 ({key})"
    with pytest.raises(ConfigError) as caught:
        check(graph)
    assert "yaml:7 (parts): trainer.loss_fn.losses: loss mse" in str(caught.value)
    assert "did you mean 'noise'?" in str(caught.value)


def test_strict_wants_proof():
    trainer = {**CONFIG["trainer"], "loss_fn": {"_target_": "ditty_di.losses.MSELoss"}}
    graph = changed(trainer=trainer)
    assert [p.entry for p in check(graph).unproven] == ["x:2:f"]
    with pytest.raises(ConfigError, match=r"x:2:f: may come from loader DataLoader"):
        check(graph, strict=True)


def test_slots_that_are_not_there_are_empty():
    graph = Graph({"trainer": {"_target_": "ditty_di.Trainer", "preprocessors": None}})
    assert not check(graph).problems
