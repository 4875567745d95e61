from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
from torch import nn

from ditty_di.contracts.stages import snake_case
from ditty_di.processors import Contract, ContractError, PostProcessor, PreProcessor


class AddNoise(PreProcessor):
    def __init__(self, scale, *, steps=10, **options):
        super().__init__(**options)
        self.scale, self.steps = scale, steps

    def process(self, batch, ctx):
        return batch, ctx


class Encoder(PreProcessor, nn.Module):
    contract = "x:2:f -> x:2:f"

    def __init__(self):
        super().__init__(name="frozen")
        self.layer = nn.Linear(2, 2)

    def process(self, batch, ctx):
        return self.layer(batch), ctx


@dataclass
class Scaled(PostProcessor):  # does not call the base's __init__
    factor: float = 2.0

    def process(self, output, ctx):
        return output * self.factor, ctx


@pytest.mark.parametrize(
    "name, snake",
    [("AddNoise", "add_noise"), ("MSELoss", "mse_loss"), ("L1Loss", "l1_loss"), ("A", "a")],
)
def test_snake_case(name, snake):
    assert snake_case(name) == snake


def test_a_processor_tells_its_arguments():
    noise = AddNoise(0.5, contract="x:1:f -> x:1:f")
    assert noise.name == "add_noise"
    assert noise.contract == Contract.parse("x:1:f -> x:1:f")
    assert noise.config() == {"scale": 0.5, "contract": "x:1:f -> x:1:f"}
    assert repr(AddNoise(scale=0.5, steps=3, name="n")) == "n(scale=0.5, steps=3, name='n')"
    assert len(repr(AddNoise(nn.Sequential(*[nn.Linear(9, 9)] * 20)))) < 90


def test_one_that_is_a_module_or_a_dataclass():
    encoder = Encoder()
    assert (encoder.name, str(encoder.contract)) == ("frozen", "x:2:f -> x:2:f")
    assert len(list(encoder.parameters())) == 2
    scaled = Scaled(3.0)
    assert (scaled.name, scaled.contract, scaled.config()) == ("scaled", None, {"factor": 3.0})
    assert scaled.process(2, {})[0] == 6.0


def test_copies_are_whole():
    for noise in (copy.deepcopy(AddNoise(0.5)), pickle.loads(pickle.dumps(AddNoise(0.5)))):
        assert (noise.scale, noise.name, noise.config()) == (0.5, "add_noise", {"scale": 0.5})


def test_errors():
    with pytest.raises(TypeError, match="scale"):
        AddNoise()
    with pytest.raises(TypeError, match="abstract"):
        PreProcessor()
    with pytest.raises(ContractError, match=r"\^"):
        AddNoise(1, contract="x:1")
