"""The shipped tasks, metrics and validators fit what they configure."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ditty_di.config import Graph

NAMED = ["tokenizer.pretrained_model_name_or_path=folder"]
CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["run=/tmp/run", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=generate", "prompt=Once upon"],
        ["task=generate_folder", "folder=/tmp/model", "prompt=Hi"],
        ["task=evaluate"],
        ["task=evaluate", "validator=loss_only"],
        ["task=export", "export.dtype=bfloat16"],
        ["task=export", "export=adapter"],
        ["task=export", "export=merged", "export.push_to=user/name"],
        ["task=export", "export=safetensors"],
        ["task=export", "export=none"],
        ["task=push", "to=user/name"],
        ["task=generate", "data=jsonl", "tokenizer=pretrained", *NAMED, "prompt=Once"],
        ["task=export", "data=jsonl", "tokenizer=pretrained", *NAMED, "export=merged"],
        ["task=generate_folder", "folder=user/name", "input_format='Q: __input__'", "prompt=Hi"],
        ["metrics=default"],
        ["metrics=wandb"],
        ["metrics=quiet"],
        ["~metrics.writers.tensorboard"],
        ["validator=default"],
        ["validator=loss_only", "metrics=quiet"],
        ["validator=none"],
    ],
    ids=" ".join,
)
def test_fits_together(overrides):
    Graph(composed(*overrides)).check("task")


@pytest.mark.parametrize("task", ["generate", "evaluate", "export"])
def test_tasks_on_a_run_name_none_by_themselves(task):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", overrides=[f"task={task}"]).run is None


def test_writers_are_added_and_taken_out_by_name(tmp_path):
    config = composed("metrics=wandb", "~metrics.writers.tensorboard", f"run={tmp_path}")
    metrics = Graph(config).build("metrics")
    kinds = [type(writer).__name__ for writer in metrics.writers]
    assert kinds == ["JSONLines", "ProgressBar", "WandB"]
    assert list(tmp_path.iterdir()) == [], "nothing is written before training starts"
    assert Graph(composed("metrics=quiet")).build("metrics").writers == []
    config.metrics.writers.wandb = None
    assert len(Graph(config).build("metrics").writers) == 2


def test_generating_from_a_folder_needs_no_data():
    config = composed("task=generate_folder", "folder=/tmp/model")
    text = OmegaConf.to_yaml(config.task)
    assert "${data" not in text and "${tokenizer}" not in text
