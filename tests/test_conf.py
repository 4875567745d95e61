"""Every configuration that ships is sound: it composes, and `check` finds nothing in it."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.graph import ConfigError, Graph

#: What a choice needs beside itself; a user has to say it too.
NEEDS = {
    "data=documents": ["data.corpus=null"],
    "data=text": ["data.corpus.path=texts"],
    "lr_scheduler=power": ["lr_scheduler.seq_len=256"],
    "model=folder": ["model.path=folder"],
    "model=titan_llama": ["weights=torchtitan", "loss=cross_entropy"],
    "parallelize=titan_llama": ["model=titan_llama", "weights=torchtitan", "loss=cross_entropy"],
    "tokenizer=pretrained": ["tokenizer.pretrained_model_name_or_path=folder"],
    "weights=pretrained": ["model=folder", "model.path=folder"],
}
#: Not in the defaults list, so they are added.
ADDED = ("experiment", "recompute", "compile", "profiler")
CHOICES = sorted(
    f"{path.parent.name}={path.stem}"
    for path in conf_dir().glob("*/*.yaml")
    if path.parent.name not in ("hydra", "task")
)


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def composed(*overrides: str) -> Graph:
    config = compose("config", [*overrides], return_hydra_config=False)
    config.run = "run"
    return Graph(config)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_sound(choice):
    plus = "+" if choice.split("=")[0] in ADDED else ""
    graph = composed(plus + choice, *NEEDS.get(choice, ()))
    assert graph.check("task").nodes
    assert graph.check("launcher").nodes


def test_a_choice_without_what_it_needs_says_so():
    with pytest.raises(ConfigError, match=r"model.path"):
        composed("model=folder").check("task")


def test_a_plain_start_is_the_pretraining_experiment():
    experiment, plain = composed("+experiment=pretrain"), composed()
    assert experiment.build("name") == plain.build("name") == "pretrain"
