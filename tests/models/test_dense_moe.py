"""A mixture that is trained densely and run sparsely, and its export in stock transformers."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ditty_di.export import HuggingFaceExport
from ditty_di.models import causal_lm
from ditty_di.models.dense_moe import DenseMoEConfig
from ditty_di.models.weights import hugging_face, initialize, materialize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from ditty_di.training.setup import setup_model
from tests.checkpoint import ranks
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import CPU, fill

IDS = torch.arange(12)[None] * 7 % 90 + 3


def config(**changes):
    sizes = {
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4},
        **{"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None},
        "initializer_range": 0.2,
    }
    return DenseMoEConfig(**sizes | changes)


def built(**changes):
    model = causal_lm.from_config(config(**changes))
    materialize(model, CPU)
    initialize(model, device=CPU, seed=1, init=hugging_face)
    return model


def experts_by_hand(mlp, x, weights):
    """The experts of each token one after another."""
    out = torch.zeros_like(x)
    for expert in range(4):
        own = slice(expert * 24, (expert + 1) * 24)
        gate, up = x @ mlp.gate_proj.weight[own].T, x @ mlp.up_proj.weight[own].T
        down = mlp.down_proj.weight[:, own]
        out += weights[:, expert, None] * (torch.nn.functional.silu(gate) * up @ down.T)
    return out


@pytest.mark.parametrize(
    "how, kept",
    [
        ({}, lambda p: torch.ones_like(p)),
        ({"inference_top_k": 2}, lambda p: p >= p.sort(-1).values[:, 2:3]),
        ({"inference_threshold": 0.3}, lambda p: (p >= 0.3) | (p == p.amax(-1, keepdim=True))),
    ],
    ids=["all", "top-k", "threshold"],
)
def test_all_experts_in_training_and_the_most_probable_ones_at_inference(how, kept):
    mlp = built(**how).model.layers[0].mlp
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    p = (x @ mlp.router.weight.T).softmax(-1)
    torch.testing.assert_close(mlp.train()(x[None])[0], experts_by_hand(mlp, x, p))
    sparse = experts_by_hand(mlp, x, p * kept(p))
    torch.testing.assert_close(mlp.eval()(x[None])[0], sparse)
    # Layers that are not plain, such as with adapters, give the same.
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    torch.testing.assert_close(mlp(x[None])[0], sparse)
    if how:
        assert (kept(p).sum(1) < 4).all() and (kept(p).sum(1) >= 1).all()


def test_every_expert_and_the_router_get_gradients():
    model = built(inference_top_k=1).train()
    model(IDS).logits.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad.flatten(1) if p.dim() > 1 else p.grad).any(), name
    gate = model.model.layers[0].mlp.gate_proj.weight.grad.unflatten(0, (4, 24))
    assert (gate.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"inference_top_k": 5}, "inference_top_k=5: write 1 to 4"),
        ({"inference_threshold": 1.5}, "inference_threshold=1.5: write between 0 and 1"),
        ({"inference_top_k": 2, "inference_threshold": 0.5}, "write one of them"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        config(**wrong)


STOCK = """\
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.startswith("ditty_di") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(12)[None] * 7 % 90 + 3
with torch.no_grad():
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    torch.save([model(ids).logits, text], sys.argv[2])
"""


def test_an_export_opens_in_stock_transformers_and_here(tmp_path: Path, monkeypatch):
    model = built(inference_top_k=2).eval()
    HuggingFaceExport(tokenizer(97), str(tmp_path / "export"))([model])
    assert (tmp_path / "export" / "dense_moe.py").exists()
    (tmp_path / "stock.py").write_text(STOCK)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, "stock.py", "export", "found.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, ids = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
        own = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(own, ids)
    again = fill(causal_lm.from_pretrained(tmp_path / "export"), tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)


def values_and_logits():
    """What each rank has of a model drawn under FSDP2, whole, and its logits at inference."""
    runtime = Runtime()
    (model,) = setup_model(
        causal_lm.from_config(config(inference_top_k=2)),
        runtime=runtime,
        weights=partial(initialize, seed=1, init=hugging_face),
        parallelize_fn=shard,
        pipeline_fn=None,
    ).modules
    with torch.no_grad():
        logits = model.eval()(IDS).logits.numpy()
    whole = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy()
        for name, p in model.named_parameters()
    }
    runtime.close()
    return whole, logits


def test_two_ranks_draw_and_compute_what_one_does():
    model = built(inference_top_k=2).eval()
    with torch.no_grad():
        expected = model(IDS).logits.numpy()
    for whole, logits in ranks.run(values_and_logits, 2):
        for name, p in model.named_parameters():
            assert (whole[name] == p.detach().numpy()).all(), name
        assert abs(logits - expected).max() < 1e-6
