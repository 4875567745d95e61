"""A Llama whose layers share keys and values, and its export with its own code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from ditty_di.export import HuggingFaceExport
from ditty_di.models import causal_lm
from ditty_di.models.cross_layer import CrossLayerConfig, CrossLayerForCausalLM
from ditty_di.models.weights import hugging_face, initialize, materialize
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import CPU, TOKENS, fill, llama, logits

KINDS = ["own", "shared", "shared", "own"]


def config(**changes):
    given = llama(num_hidden_layers=4).to_diff_dict() | {"key_value_layers": KINDS} | changes
    return CrossLayerConfig(**{k: v for k, v in given.items() if k != "model_type"})


def drawn(**options):
    model = causal_lm.from_config(config(), **options)
    materialize(model, CPU)
    initialize(model, device=CPU, seed=3, init=hugging_face)
    return model.eval()


def test_layers_that_own_all_their_keys_and_values_are_those_of_llama():
    own = causal_lm.from_config(config(key_value_layers=["own"] * 4))
    materialize(own, CPU)
    initialize(own, device=CPU, seed=3, init=hugging_face)
    stock = LlamaForCausalLM(llama(num_hidden_layers=4))
    stock.load_state_dict(own.state_dict())
    assert torch.equal(logits(own.eval()), logits(stock.eval()))


def test_shared_layers_attend_to_the_keys_and_values_of_the_last_layer_with_its_own():
    """A Llama with the same projections in each layer, and the inputs of the owner's: by hand."""
    model = drawn()
    names = [n for n, _ in model.named_parameters() if "k_proj" in n or "v_proj" in n]
    assert [n.split(".")[2] for n in names] == ["0", "0", "3", "3"]
    owner, sharing = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    seen = {}
    owner.register_forward_hook(lambda m, a, out: seen.update(own=out[2]))
    sharing.register_forward_pre_hook(
        lambda m, a, kw: seen.update(shared=kw["key_values"]), with_kwargs=True
    )
    logits(model)
    assert all(torch.equal(a, b) for a, b in zip(seen["own"], seen["shared"], strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_continues_as_without(attention):
    model = drawn(attn_implementation=attention)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    inputs = {"input_ids": TOKENS[:, :5].repeat(2, 1), "attention_mask": mask}
    cached = model.generate(**inputs, **options, use_cache=True, return_dict_in_generate=True)
    plain = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain)
    held = [layer.get_seq_length() for layer in cached.past_key_values.layers]
    assert held == [10, 0, 0, 10], "only the owners' keys and values are kept"
    beams = {**options, "num_beams": 2, "use_cache": True}
    assert model.generate(**inputs, **beams).shape == plain.shape


OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "ditty_di" not in sys.modules and type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    print(json.dumps(model.eval()(torch.arange(12)[None]).logits.flatten().tolist()))
model.save_pretrained(sys.argv[2])
"""


def opened_by_stock(folder, again, cache):
    """The logits of `tests.models.tiny.TOKENS` in a process that does not know this package."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), str(again)],
        capture_output=True,
        text=True,
        cwd=cache,
        env={"HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def test_an_export_opens_in_stock_transformers_and_here(tmp_path):
    model = drawn()
    HuggingFaceExport(tokenizer(61), str(tmp_path / "export"))([model])
    expected = logits(model)
    read = fill(causal_lm.from_pretrained(tmp_path / "export"), tmp_path / "export")
    assert type(read) is CrossLayerForCausalLM and torch.equal(logits(read), expected)
    stock = opened_by_stock(tmp_path / "export", tmp_path / "again", tmp_path)
    assert torch.equal(stock, expected.flatten())
    assert (tmp_path / "again" / "cross_layer.py").exists()


@pytest.mark.parametrize("kinds", [["shared"] * 4, ["own"] * 3, ["own", "borrowed"] * 2])
def test_a_wrong_pattern_is_refused(kinds):
    with pytest.raises(ValueError, match="write own or shared for each of the 4 layers"):
        config(key_value_layers=kinds)
