"""Every configuration that ships is sound: it composes, and `check` finds nothing in it."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import ConfigError, Graph

#: What a choice needs beside itself; a user has to say it too.
FINE_TUNING = ["tokenizer=of_model", "model=hf_causal_lm", "validator=finetune"]
EXAMPLES = ["data=jsonl", *FINE_TUNING]
NEEDS = {
    **{f"data={name}": FINE_TUNING for name in ("alpaca", "debug", "dolly", "jsonl")},
    **{f"data={name}": FINE_TUNING for name in ("slim_orca", "sst2")},
    **{f"batching={name}": EXAMPLES for name in ("length_grouped", "packed", "padded")},
    "batching=padding_free": EXAMPLES,
    "batching=seq2seq": EXAMPLES,
    "data=examples": [
        *("data.train_records=null", "data.validation_records=null"),
        *FINE_TUNING,
    ],
    "data=digits": ["model=dit_digits", "validator=loss_only", "export=none"],
    "data=rows": [
        *("tokenizer=none", "model=dit_digits", "validator=loss_only", "export=none"),
        "data.train._target_=builtins.list",
    ],
    "experiment=module": [
        "model._target_=torch.nn.Identity",
        "data.train._target_=builtins.list",
    ],
    "loss=function": ["loss._target_=torch.nn.functional.mse_loss"],
    "model=module": ["model._target_=torch.nn.Identity"],
    "model=hf_seq2seq": ["model.path=folder"],
    "tokenizer=of_model": ["model=hf_causal_lm"],
    "validator=finetune": EXAMPLES,
    "data=documents": ["data.corpus=null"],
    "data=text": ["data.corpus.path=launch/constraints.txt"],
    "lr_scheduler=power": ["lr_scheduler.seq_len=256"],
    "model=titan_llama": ["weights=torchtitan", "loss=cross_entropy"],
    "parallelize=titan_llama": ["model=titan_llama", "weights=torchtitan", "loss=cross_entropy"],
    "tokenizer=pretrained": ["tokenizer.pretrained_model_name_or_path=folder"],
    "weights=pretrained": ["model=hf_causal_lm"],
}
#: Not in the defaults list, so they are added.
ADDED = ("experiment", "callbacks", "recompute", "compile", "profiler", "neftune")
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
        composed("model=hf_seq2seq").check("task")


def test_a_plain_start_is_the_pretraining_experiment():
    experiment, plain = composed("+experiment=pretrain"), composed()
    assert experiment.build("name") == plain.build("name") == "pretrain"
