from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from ditty_di.processors import Context


class Pair(NamedTuple):
    a: object
    b: object


def test_a_missing_key_names_what_there_is_and_what_was_meant():
    ctx = Context(target=1, epoch=0)
    with pytest.raises(KeyError) as caught:
        ctx["tragets"]
    text = str(caught.value)
    assert "did you mean 'target'?" in text
    assert "it has target, epoch" in text
    assert ctx.get("mask") is None


def test_paths_lead_into_nested_mappings():
    ctx = Context(forward_kwargs={"t": 3}, epoch=0)
    assert ctx.at("forward_kwargs.t") == 3
    assert ctx.at("epoch") == 0
    with pytest.raises(KeyError, match=r"'forward_kwargs' has no 'y'; it has t"):
        ctx.at("forward_kwargs.y")
    with pytest.raises(KeyError, match="the context has no 'nothing'"):
        ctx.at("nothing.y")
    with pytest.raises(KeyError, match="'epoch' has no 'y'"):
        ctx.at("epoch.y")
    assert Context({"a.b": 1}).at("a.b") == 1


def test_to_moves_tensors_wherever_they_are_and_nothing_else():
    tensor, module = torch.ones(2), torch.nn.Linear(1, 1)
    ctx = Context(
        target=tensor,
        original_batch=({"input": tensor}, [torch.zeros(1)]),
        forward_kwargs={"pair": Pair(torch.ones(1), "text")},
        model=module,
        device=torch.device("cpu"),
        step=3,
    )
    moved = ctx.to(torch.device("meta"))
    assert type(moved) is Context
    assert moved["target"].device.type == "meta"
    assert moved["original_batch"][0]["input"] is moved["target"]  # once, not twice
    assert moved["original_batch"][1][0].is_meta
    assert type(moved["forward_kwargs"]["pair"]) is Pair
    assert moved["forward_kwargs"]["pair"].a.is_meta
    assert moved["model"] is module and not module.weight.is_meta
    assert (moved["step"], moved["device"]) == (3, torch.device("meta"))
    assert not ctx["target"].is_meta
