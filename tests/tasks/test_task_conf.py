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
        ["task=export", "~export"],
        ["task=push", "to=user/name"],
        ["task=generate", "data=jsonl", "tokenizer=pretrained", *NAMED, "prompt=Once"],
        ["task=export", "data=jsonl", "tokenizer=pretrained", *NAMED, "export=merged"],
        ["task=generate_folder", "folder=user/name", "input_format='Q: __input__'", "prompt=Hi"],
        ["logger=default"],
        ["logger=wandb"],
        ["logger=quiet"],
        ["~logger.loggers.tensorboard"],
        ["validator=default"],
        ["validator=loss_only", "logger=quiet"],
        ["~validator"],
    ],
    ids=" ".join,
)
def test_fits_together(overrides):
    Graph(composed(*overrides)).check("task")


@pytest.mark.parametrize("task", ["generate", "evaluate", "export"])
def test_tasks_on_a_run_name_none_by_themselves(task):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", overrides=[f"task={task}"]).run is None


def test_loggers_are_added_and_taken_out_by_name(tmp_path):
    config = composed("logger=wandb", "~logger.loggers.tensorboard", f"run={tmp_path}")
    logger = Graph(config).build("logger")
    kinds = [type(one).__name__ for one in logger.loggers]
    assert kinds == ["JSONLines", "ProgressBar", "WandB"]
    assert list(tmp_path.iterdir()) == [], "nothing is written before training starts"
    assert Graph(composed("logger=quiet")).build("logger").loggers == []
    config.logger.loggers.wandb = None
    assert len(Graph(config).build("logger").loggers) == 2


def test_generating_from_a_folder_needs_no_data():
    config = composed("task=generate_folder", "folder=/tmp/model")
    text = OmegaConf.to_yaml(config.task)
    assert "${data" not in text and "${tokenizer}" not in text
