"""transformer-engine, without a machine for it: what is missing is said, and what it would get."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import nn

from ditty_di.precision.transformer_engine import activation_checkpointing, convert
from tests.precision import cases

installed = importlib.util.find_spec("transformer_engine") is not None


@pytest.mark.skipif(installed, reason="transformer-engine is installed")
@pytest.mark.parametrize("use", [convert, activation_checkpointing])
def test_without_it_one_sentence_says_what_to_install(use):
    with pytest.raises(ImportError, match=r"pip install 'ditty_di\[fp8\]'") as error:
        use(nn.Sequential(nn.Linear(16, 16)))
    assert "\n" not in str(error.value)


class Linear(nn.Module):
    """The part of `transformer_engine.pytorch.Linear`'s documented interface that is used."""

    def __init__(self, in_features, out_features, *, bias, params_dtype, device):
        super().__init__()
        options = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None

    def forward(self, x):
        assert active, "outside of the autocast it would not be float8"
        return nn.functional.linear(x, self.weight, self.bias)


active: list[object] = []


@contextmanager
def autocast(enabled, recipe):
    assert enabled
    active.append(recipe)
    try:
        yield
    finally:
        active.pop()


class Float8CurrentScaling: ...


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for the third-party package."""
    import peft  # noqa: F401  # looks for the real one when it is imported

    names = ("", ".common", ".common.recipe", ".pytorch")
    modules = {name: ModuleType(f"transformer_engine{name}") for name in names}
    modules[".pytorch"].__dict__.update(Linear=Linear, autocast=autocast)
    modules[".common.recipe"].__dict__.update(Float8CurrentScaling=Float8CurrentScaling)
    modules[""].__dict__.update(common=modules[".common"], pytorch=modules[".pytorch"])
    modules[".common"].__dict__.update(recipe=modules[".common.recipe"])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    return modules[".pytorch"]


def test_layers_keep_their_names_and_tensors(engine):
    plain = cases.lora(cases.llama())
    before = dict(plain.named_parameters())
    model = convert(plain)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    names = {name for name, m in model.named_modules() if isinstance(m, Linear)}
    assert len(names) == 2 * 7 and not any("lora_" in name for name in names)


def test_the_forward_pass_is_in_its_autocast(engine):
    layer = nn.Linear(16, 16)
    model = convert(nn.Sequential(layer, nn.Linear(16, 3)))
    x = torch.randn(2, 16)
    torch.testing.assert_close(model[0].weight, layer.weight)
    assert model(x).shape == (2, 3) and not active
    with pytest.raises(AssertionError):
        model[0](x)


def test_an_older_name_of_the_autocast(engine):
    del engine.autocast
    engine.fp8_autocast = lambda enabled, fp8_recipe: autocast(enabled, fp8_recipe)
    assert convert(nn.Sequential(nn.Linear(16, 16)))(torch.randn(2, 16)).shape == (2, 16)


def test_a_recipe_by_name_or_as_an_object(engine):
    seen = []
    engine.autocast = lambda enabled, recipe: (seen.append(recipe), autocast(enabled, recipe))[1]
    mine = object()
    for recipe in ("Float8CurrentScaling", mine):
        convert(nn.Sequential(nn.Linear(16, 16)), recipe=recipe)(torch.randn(2, 16))
    assert isinstance(seen[0], Float8CurrentScaling) and seen[1] is mine
    with pytest.raises(ValueError, match="has no 'Delayed'"):
        convert(nn.Sequential(nn.Linear(16, 16)), recipe="Delayed")
