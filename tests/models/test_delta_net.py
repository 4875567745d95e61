"""Plain DeltaNet: the recurrence of its paper, generation, and an export with its own code."""

from __future__ import annotations

import torch
from transformers import OlmoHybridConfig

from ditty_di.export import HuggingFaceExport
from ditty_di.models import causal_lm
from ditty_di.models.delta_net import DeltaNet, DeltaNetConfig, DeltaNetForCausalLM
from ditty_di.models.weights import hugging_face, initialize, materialize
from tests.models.families import config
from tests.models.test_cross_layer import opened_by_stock
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import CPU, TOKENS, fill, logits

TYPES = ["linear_attention", "full_attention"]


def small(**changes):
    sizes = config("olmo_hybrid", {"layer_types": TYPES}).to_diff_dict()
    sizes = {k: v for k, v in sizes.items() if k not in ("model_type", "architectures")}
    return DeltaNetConfig(**{**sizes, **changes})


def drawn():
    model = causal_lm.from_config(small())
    materialize(model, CPU)
    initialize(model, device=CPU, seed=3, init=hugging_face)
    return model.eval()


def test_the_state_is_corrected_by_each_token_and_never_decays():
    """Equations 1 and 2 of arXiv 2406.06484, token by token."""
    torch.manual_seed(0)
    layer = DeltaNet(small(linear_num_key_heads=4), 0)
    hidden = torch.randn(2, 9, 32)
    widths = [linear(hidden) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)]
    mixed = torch.cat(widths, -1)  # [batch, seq, channels]
    earlier = torch.nn.functional.pad(mixed, (0, 0, 3, 0))
    taps = layer.conv1d.weight[:, 0].T  # [4, channels]
    mixed = sum(earlier[:, i : i + 9] * taps[i] for i in range(4))
    mixed = torch.nn.functional.silu(mixed)
    query, key, value = (x.unflatten(-1, (4, -1)) for x in mixed.split(layer.widths, -1))
    query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    beta = 2 * layer.b_proj(hidden).sigmoid()[..., None]
    state, outputs = torch.zeros(2, 4, 8, 8), []
    for q, k, v, b in zip(*(x.unbind(1) for x in (query, key, value, beta)), strict=True):
        error = v - torch.einsum("bhkv,bhk->bhv", state, k)
        state = state + b[..., None] * k[..., None] * error[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q) / 8**0.5)
    expected = layer.o_proj(layer.o_norm(torch.stack(outputs, 1)).flatten(2))
    torch.testing.assert_close(layer(hidden), expected, atol=1e-5, rtol=1e-4)


def test_generation_with_a_cache_continues_as_without():
    model = drawn()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = TOKENS[:, :7]
    cached = model.generate(ids, **options, use_cache=True)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))


def test_an_export_opens_in_stock_transformers_and_here(tmp_path):
    model = drawn()
    HuggingFaceExport(tokenizer(97), str(tmp_path / "export"))([model])
    expected = logits(model)
    read = fill(causal_lm.from_pretrained(tmp_path / "export"), tmp_path / "export")
    assert type(read) is DeltaNetForCausalLM and torch.equal(logits(read), expected)
    stock = opened_by_stock(tmp_path / "export", tmp_path / "again", tmp_path)
    assert torch.equal(stock, expected.flatten())


def test_it_has_no_gates():
    gates = ("a_proj", "g_proj", "A_log", "dt_bias")
    names = [name for name, _ in drawn().named_parameters()]
    assert not [name for name in names if any(gate in name for gate in gates)]
    assert isinstance(small(), OlmoHybridConfig)
