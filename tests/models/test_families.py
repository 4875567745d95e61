"""Any family of transformers: read, exported and read again, its logits are those of transformers.

What is saved by `save_pretrained` is the reference: names and shapes of the files differ from the
model's own in many families.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ditty_di.export import HuggingFaceExport
from ditty_di.models import causal_lm, seq2seq
from ditty_di.models.weights import hugging_face, initialize, materialize, uninitialized
from tests.models.families import CAUSAL, RARE, SEQ2SEQ, config
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import CPU, fill

TOKENS = torch.arange(12)[None] * 7 % 90 + 3

CASES = [
    *(pytest.param("causal", *item, id=item[0]) for item in CAUSAL.items()),
    *(pytest.param("seq2seq", *item, id=f"seq2seq-{item[0]}") for item in SEQ2SEQ.items()),
    *(pytest.param("causal", *item, id=item[0], marks=pytest.mark.slow) for item in RARE.items()),
]
OURS = {"causal": causal_lm, "seq2seq": seq2seq}
STOCK = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}


def logits(model, kind):
    decoder = {"decoder_input_ids": TOKENS[:, :5]} if kind == "seq2seq" else {}
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False, **decoder).logits


def save(folder, config, kind):
    """Saves a model of transformers in which no tensor equals what a constructor makes."""
    torch.manual_seed(1)
    model = STOCK[kind].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


def shapes(folder: Path) -> dict[str, list[int]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:  # which are no mapping
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("kind, model_type, changes", CASES)
def test_it_is_read_exported_and_read_again(kind, model_type, changes, tmp_path):
    base, export, again = (tmp_path / name for name in ("base", "export", "again"))
    save(base, config(model_type, changes), kind)
    stock = STOCK[kind].from_pretrained(base)
    expected = logits(stock, kind)

    model = fill(OURS[kind].from_pretrained(base), base)
    assert torch.equal(logits(model, kind), expected)
    HuggingFaceExport(tokenizer(97), str(export))([model])
    assert torch.equal(logits(STOCK[kind].from_pretrained(export), kind), expected)
    assert torch.equal(logits(fill(OURS[kind].from_pretrained(export), export), kind), expected)
    stock.save_pretrained(again)
    assert shapes(export) == shapes(again)


@pytest.mark.parametrize("kind, model_type, changes", CASES)
def test_it_is_initialised_from_random_numbers(kind, model_type, changes):
    models = [OURS[kind].from_config(config(model_type, changes)) for _ in range(2)]
    for model in models:
        materialize(model, CPU)
        initialize(model, device=CPU, init=hugging_face)
        assert not uninitialized(model)
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_never_read_in_16_bits_is_not_exported_in_them(tmp_path):
    """DeepSeek chooses experts by a bias, and rounding it would choose others."""
    save(tmp_path / "base", config("deepseek_v3", CAUSAL["deepseek_v3"]), "causal")
    model = fill(causal_lm.from_pretrained(tmp_path / "base"), tmp_path / "base")
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    bias.copy_(torch.tensor([1.0, 1.0001, 0.9999, 1.0002]))
    HuggingFaceExport(tokenizer(97), str(tmp_path / "half"), dtype="bfloat16")([model])
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(read.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert read.lm_head.weight.dtype == torch.bfloat16
