"""conf/precision: what each choice injects."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import Graph


def composed(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", [*overrides])
    config.run = "run"
    return Graph(config)


def test_float16_has_a_loss_scaler_of_the_device():
    graph = composed("precision=fp16")
    runtime = graph.build("runtime")
    try:
        scaler = graph.build("trainer.grad_scaler")
        assert scaler.is_enabled() and scaler.get_scale() == 65536.0
        assert scaler._device == runtime.device.type
        assert graph.build("parallelize").keywords["param_dtype"] == "float16"
    finally:
        runtime.close()


@pytest.mark.parametrize("choice", ["bf16", "fp16", "fp8", "fp8_te"])
def test_gradients_are_reduced_in_float32(choice):
    keywords = composed(f"precision={choice}").build("parallelize").keywords
    assert keywords["reduce_dtype"] == "float32"
    assert getattr(torch, keywords["param_dtype"]).itemsize == 2


@pytest.mark.parametrize("choice, function", [("fp8", "torchao"), ("fp8_te", "convert")])
def test_float8_converts_the_model(choice, function):
    graph = composed(f"precision={choice}")
    assert graph.build("model.convert").func.__name__ == function
