"""The configuration group, composed as the command line does."""

from functools import partial
from inspect import signature
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ditty_di.checkpoint import Checkpointer

CONF = Path(__file__).parents[2] / "conf"


def composed(choice, tmp_path):
    (tmp_path / "root.yaml").write_text(
        f"defaults: [checkpoint: {choice}, _self_]\nrun: out\nload: {{optimizer: false}}\n"
        f"hydra: {{searchpath: ['file://{CONF}']}}\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        return compose("root")


@pytest.mark.parametrize("choice, background", [("sync", False), ("async", True)])
def test_choices(tmp_path, choice, background):
    config = composed(choice, tmp_path)
    factory = instantiate(OmegaConf.to_container(config, resolve=True)["checkpoint"])
    assert isinstance(factory, partial) and factory.func is Checkpointer
    assert factory.keywords["async_save"] is background
    assert factory.keywords["folder"] == "out/checkpoints"
    assert factory.keywords["load"] == {"optimizer": False}
    signature(factory).bind(states={}, rank_states={})
