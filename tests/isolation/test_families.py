"""Packed rows of hybrid models and mixtures of experts are exact, or refused by name.

Models of transformers with random values, both kinds of layers in each hybrid. A token of one
document is changed: no logit of another one may move, and the logits of each document are those
that it has alone.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ditty_di.data import PackedCollate, PaddingFreeCollate
from ditty_di.isolation.probe import Isolation, NotIsolated
from ditty_di.models import causal_lm
from ditty_di.models.weights import hugging_face, initialize, materialize
from tests.models.families import CAUSAL, HYBRID, RARE, config
from tests.models.tiny import CPU

PLAIN = "position_ids alone"
SPLIT = "a row of its own for each document in recurrent layers"
BY_LAYER = "a 4-D attention_mask for each kind of layer"
EXPERTS = (
    *("afmoe", "dbrx", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo"),
    *("glm4_moe", "gpt_oss", "granitemoe", "granitemoeshared", "jetmoe", "llama4_text"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open"),
)
#: By family, where it is not the form of its kind.
FORMS = {
    "afmoe": BY_LAYER,
    "gpt_oss": BY_LAYER,
    "granitemoehybrid": f"{SPLIT}, and a 4-D boolean attention_mask",
}
#: Their state is not in a module with a convolution.
REFUSED = ("minimax", "rwkv", "xlstm")
DOCUMENTS = {"packed": [[5, 9, 1, 3], [11, 7]], "padding-free": [[6, 1, 9]]}


@cache
def model_of(name):
    torch.manual_seed(0)
    model = causal_lm.from_config(config(name, {**CAUSAL, **RARE}[name]))
    materialize(model, CPU)
    initialize(model, device=CPU, init=hugging_face)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def batch(how):
    """Inputs of a micro-batch."""
    lengths = DOCUMENTS[how]
    ids = [torch.randint(3, 97, (sum(row),)) for row in lengths]
    if how == "padding-free":
        parts = ids[0].split(lengths[0])
        return PaddingFreeCollate()([({"input": part}, part) for part in parts])[0]
    at = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    rows = [({"input": i, "position_ids": p}, i) for i, p in zip(ids, at, strict=True)]
    return PackedCollate()(rows)[0]


def probed(model, inputs):
    isolation = Isolation(
        model,
        config=model.config,
        forward=lambda given: call(model, given),
        device=CPU,
        agree=bool,
        name=model.config.model_type,
    )
    isolation.ensure(inputs)
    return isolation.form


@torch.no_grad()
def call(model, inputs):
    return model(inputs["input"], **{k: v for k, v in inputs.items() if k != "input"}).logits


def spans(how):
    """(row, first, last + 1) of each document."""
    for row, lengths in enumerate(DOCUMENTS[how]):
        for number, length in enumerate(lengths):
            begin = sum(lengths[:number])
            yield row, begin, begin + length


CASES = [
    *((name, how) for name in HYBRID for how in DOCUMENTS),
    *((name, "packed") for name in EXPERTS),
    *(("mixtral", "padding-free"), ("gpt_oss", "padding-free")),
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_documents_of_a_row_do_not_see_each_other(name, how):
    model, inputs = model_of(name), batch(how)
    for hook in list(model._forward_pre_hooks):  # of the other way of packing
        model._forward_pre_hooks.pop(hook)
    assert probed(model, inputs) == FORMS.get(name, SPLIT if name in HYBRID else PLAIN)
    found = call(model, inputs)
    for row, begin, end in spans(how):
        alone = call(model, {"input": inputs["input"][row : row + 1, begin:end]})
        torch.testing.assert_close(found[row, begin:end], alone[0], atol=1e-5, rtol=1e-5)
    changed = inputs["input"].clone()
    changed[0, 2] = 3 + (changed[0, 2] - 2) % 94
    # An expert with another number of tokens rounds otherwise.
    moved = (call(model, inputs | {"input": changed}) - found).abs().amax(-1) > 1e-6
    first = DOCUMENTS[how][0][0]
    assert moved[0, 2:first].all() and moved.sum() == moved[0, 2:first].sum()


@pytest.mark.parametrize("how", DOCUMENTS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_keep_them_apart_is_refused_by_name(name, how):
    with pytest.raises(NotIsolated, match=f"{name}: state crosses.*batching=padded"):
        probed(model_of(name), batch(how))


@pytest.mark.parametrize("name", [*HYBRID, *EXPERTS])
def test_padding_changes_no_document(name):
    """On the right without a mask, as in training; on the left with one, as in generation."""
    model, ids = model_of(name), torch.randint(3, 97, (2, 13))
    alone = call(model, {"input": ids[:1, :9]})[0]
    right = ids.clone()
    right[0, 9:] = 0
    torch.testing.assert_close(call(model, {"input": right})[0, :9], alone, atol=1e-5, rtol=1e-5)
    if name == "recurrent_gemma":
        return  # its convolution and state read padding on the left, in transformers too
    left = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), ids[0, :9]]), ids[1]])
    mask = torch.ones_like(left)
    mask[0, :4] = 0
    given = {"input": left, "attention_mask": mask}
    given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(call(model, given)[0, 4:], alone, atol=1e-5, rtol=1e-5)
