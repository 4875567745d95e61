"""Kinds of layers from a pattern."""

import pytest
import yaml
from transformers import OlmoHybridConfig, Qwen3NextConfig

from ditty_di.cli.searchpath import conf_dir
from ditty_di.models.pattern import layer_kinds


def test_a_pattern_repeats_over_the_layers():
    linear, full = "linear_attention", "full_attention"
    expected = [linear, linear, linear, full] * 2
    assert layer_kinds("DDDA", num_hidden_layers=8) == expected
    assert layer_kinds("3DA", num_hidden_layers=8) == expected
    assert layer_kinds("3D2A3D", num_hidden_layers=8) == [linear] * 3 + [full] * 2 + [linear] * 3
    letters = {"K": "own", "S": "shared"}
    assert layer_kinds("K2S", num_hidden_layers=3, kinds=letters) == ["own", "shared", "shared"]


@pytest.mark.parametrize("kind", [Qwen3NextConfig, OlmoHybridConfig])
def test_configurations_of_transformers_accept_it(kind):
    types = layer_kinds("DDDA", num_hidden_layers=8)
    assert kind(num_hidden_layers=8, layer_types=types).layer_types == types


def test_the_shipped_hybrid_takes_no_letter_that_its_model_has_no_layers_for():
    """A Qwen3-Next leaves out the attention of other kinds without a word."""
    node = yaml.safe_load((conf_dir() / "model/hybrid_tiny.yaml").read_text())["config"]
    kinds = node["layer_types"]["kinds"]
    assert layer_kinds("DA", num_hidden_layers=2, kinds=kinds) == [kinds["D"], kinds["A"]]
    for letter in "SCE":
        with pytest.raises(
            ValueError, match=rf"unknown letter {letter}; write A \(full_attention\), D"
        ):
            layer_kinds(f"D{letter}", num_hidden_layers=2, kinds=kinds)


WRONG = {
    ("DXA", 3): "unknown letter X; write A (full_attention), S (sliding_attention)",
    ("DDDA", 6): "4 layers, and num_hidden_layers=6 is not a multiple; write num_hidden_layers=4",
    ("DDDA", 2): "write num_hidden_layers=4, or a pattern of all 2",
    ("", 2): "write letters, each with a number before it or without, such as 3DA",
    ("D+A", 2): "write letters",
    ("A3", 4): "write letters",
    ("0D", 4): "no layers",
}


@pytest.mark.parametrize("pattern, layers", WRONG)
@pytest.mark.parametrize("check", [layer_kinds, layer_kinds.validate], ids=["call", "check"])
def test_a_wrong_pattern_is_refused_before_anything_is_built(check, pattern, layers):
    with pytest.raises(ValueError) as error:
        check(pattern=pattern, num_hidden_layers=layers)
    assert WRONG[pattern, layers] in str(error.value)
