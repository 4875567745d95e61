"""Checkpoints of dolomite-engine and lm-engine: their layout by their own forward, and back."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteMoeConfig, LlamaConfig

from ditty_di.models import dolomite
from ditty_di.models.deferred import deferred
from ditty_di.models.dolomite import to_dolomite, to_hugging_face, to_lm_engine
from ditty_di.tasks.convert import convert

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MODELS = {
    "llama, mha": LlamaConfig(**SMALL, num_key_value_heads=4),
    "llama, gqa, biases": LlamaConfig(**SMALL, num_key_value_heads=2, **BIASES),
    "llama, mqa, tied": LlamaConfig(
        **{**SMALL, "tie_word_embeddings": True}, num_key_value_heads=1
    ),
    "granite": GraniteConfig(**SMALL, num_key_value_heads=2, **MULTIPLIERS),
    "granitemoe": GraniteMoeConfig(**SMALL, num_key_value_heads=2, **MULTIPLIERS, **EXPERTS),
}
LAYOUTS = {
    "dolomite": (to_dolomite, to_hugging_face),
    "lm_engine": (to_lm_engine, to_hugging_face),
    "lm_engine, interleaved": (
        partial(to_lm_engine, interleaved=True),
        partial(to_hugging_face, interleaved=True),
    ),
}
TOKENS = torch.tensor([5, 9, 2, 33, 7, 7, 1, 20])


@pytest.fixture(scope="module", params=MODELS)
def stock(request, tmp_path_factory):
    """A folder that stock transformers wrote, in several files, and the logits of its model."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[request.param]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases are 0 and norms 1 otherwise
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size="12KB")
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    with torch.no_grad():
        return folder, model(TOKENS[None]).logits[0]


def tensors(folder) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def about(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


# -- their forward ---------------------------------------------------------------------------------


def forward(config: dict, weights: dict[str, Tensor], interleaved: bool) -> Tensor:
    """Logits `[seq, vocab]` as dolomite-engine's and lm-engine's modules compute them."""
    blocks = "sequence_mixer_blocks" in config
    mixer = config["sequence_mixer_blocks"][0] if blocks else config
    attention, mlp = ("sequence_mixer", "mlp_block") if blocks else ("attn", "mlp")
    heads, kv_heads = (
        mixer["num_attention_heads" if blocks else "n_head"],
        mixer["num_key_value_heads"],
    )
    width, eps = config["hidden_size" if blocks else "n_embd"], config["layer_norm_epsilon"]
    head, residual = width // heads, config["m_residual"] or 1

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (width,), weights[f"{name}.weight"], eps)

    def swiglu(x: Tensor) -> Tensor:
        if interleaved:
            return x[..., 1::2] * F.silu(x[..., ::2])
        up, gate = x.chunk(2, dim=-1)
        return up * F.silu(gate)

    angles = torch.outer(
        torch.arange(len(TOKENS)).float(),
        1 / config["rope_theta"] ** (torch.arange(0, head, 2).float() / head),
    ).repeat(1, 2)  # fmt: skip

    def rotated(x: Tensor) -> Tensor:  # [heads, seq, head]
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    def attend(x: Tensor, name: str) -> Tensor:
        x = linear(x, f"{name}.c_attn").view(len(x), kv_heads, -1)
        q, k, v = x.split((heads // kv_heads * head, head, head), dim=-1)
        q = q.reshape(len(x), heads, head)
        q, k, v = (one.transpose(0, 1) for one in (q, k, v))
        scale = mixer["attention_multiplier"]
        out = F.scaled_dot_product_attention(
            rotated(q), rotated(k), v, is_causal=True, scale=scale, enable_gqa=True
        )
        return linear(out.transpose(0, 1).flatten(1), f"{name}.c_proj")

    def feed(x: Tensor, name: str) -> Tensor:
        fused, out = weights[f"{name}.c_fc.weight"], weights[f"{name}.c_proj.weight"]
        if fused.ndim == 2:
            return linear(swiglu(linear(x, f"{name}.c_fc")), f"{name}.c_proj")
        chosen, experts = linear(x, f"{name}.gate").topk(2, dim=-1)
        rows = []
        for row, shares, of in zip(x, chosen.softmax(-1), experts, strict=True):
            made = [F.linear(swiglu(F.linear(row, fused[e])), out[e]) for e in of]
            rows.append(sum(share * one for share, one in zip(shares, made, strict=True)))
        return torch.stack(rows)

    x = weights["transformer.wte.weight"][TOKENS] * (config["m_emb"] or 1)
    for n in range(SMALL["num_hidden_layers"]):
        layer = f"transformer.h.{n}"
        x = x + residual * attend(norm(x, f"{layer}.ln_1"), f"{layer}.{attention}")
        x = x + residual * feed(norm(x, f"{layer}.ln_2"), f"{layer}.{mlp}")
    last = weights.get("lm_head.weight", weights["transformer.wte.weight"])
    return norm(x, "transformer.ln_f") @ last.T / (config["m_width"] or 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_theirs_and_the_way_back_changes_no_byte(stock, layout, tmp_path):
    folder, logits = stock
    there, back = LAYOUTS[layout]
    convert(str(folder), str(tmp_path / "theirs"), there, max_shard_size="12KB")
    theirs = about(tmp_path / "theirs")
    own = forward(theirs, tensors(tmp_path / "theirs"), "interleaved" in layout)
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-5)

    convert(str(tmp_path / "theirs"), str(tmp_path / "back"), back, max_shard_size="12KB")
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert len([*(tmp_path / "back").glob("*.safetensors")]) > 1
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"a": 1}'
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.config.to_dict() | {"_name_or_path": ""} == original.config.to_dict() | {
        "_name_or_path": ""
    }
    with torch.no_grad():
        assert torch.equal(opened(TOKENS[None]).logits[0], logits)


# -- files by hand ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """config.json and tensors of a Llama for dolomite-engine, and of one for lm-engine."""
    folder, found = tmp_path_factory.mktemp("theirs"), {}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS["llama, mha"]).save_pretrained(folder / "stock")
    for name in ("dolomite", "lm_engine"):
        convert(str(folder / "stock"), str(folder / name), LAYOUTS[name][0])
        found[name] = about(folder / name), tensors(folder / name)
    return found


def written(folder, config: dict, weights: dict[str, Tensor]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_inner": None}, {"intermediate_size": 128}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"scale_attn_weights": False}, {"model_type": "granite", "attention_multiplier": 1.0}),
        ({"m_width": 4.0}, {"logits_scaling": 4.0, "attention_multiplier": 8**-0.5}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}),
    ],
    ids=str,
)
def test_what_a_configuration_says_otherwise(theirs, changes, expected, tmp_path):
    config, weights = theirs["dolomite"]
    if "n_inner" in changes:
        rows = {".c_fc.": (256, 32), "mlp.c_proj.": (32, 128)}
        weights = {
            name: torch.zeros(next((s for part, s in rows.items() if part in name), value.shape))
            for name, value in weights.items()
        }
    path = written(tmp_path / "in", config | changes, weights)
    convert(path, str(tmp_path / "out"), to_hugging_face)
    assert about(tmp_path / "out").items() >= expected.items()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if "rope_scaling" in changes:
        assert opened.config.rope_parameters == {
            "rope_type": "linear", "rope_theta": 500.0, "factor": 2.0,
        }  # fmt: skip


def test_blocks_say_whether_rows_alternate(theirs, tmp_path):
    config, weights = theirs["lm_engine"]
    config = config | {
        "mlp_blocks": [block | {"use_interleaved_weights": True} for block in config["mlp_blocks"]]
    }
    path = written(tmp_path / "in", config, weights)
    convert(path, str(tmp_path / "out"), to_hugging_face)
    up = tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(up, weights["transformer.h.0.mlp_block.c_fc.weight"][1::2])


@pytest.mark.parametrize("dim", [0, 1])
def test_any_slice_of_alternating_rows_is_read(dim):
    gate, up = torch.randn(2, 4, 6, 3).unbind()
    fused = dolomite._join_rows(True, deferred(gate), deferred(up), dim)
    expected = torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)
    halves = dolomite._split_rows(True, deferred(expected), dim)
    for start, stop in ((0, None), (1, 2), (1, 4), (2, 7), (3, 3), (5, 6)):
        part = (*[slice(None)] * dim, slice(start, stop))
        assert torch.equal(fused.read(part), expected[part])
        for half, whole in zip(halves, (gate, up), strict=True):
            assert torch.equal(half.read(part), whole[part])


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("dolomite", {"activation_function": "gelu"}, r"activation_function='gelu'; .* 'swiglu'"),
        (
            "dolomite",
            {"attention_head_type": "mla"},
            r"attention_head_type='mla'; .* 'mha' or 'mqa'",
        ),
        ("dolomite", {"attention_head_type": "mqa"}, r"num_key_value_heads=4 do not fit .*'mqa'"),
        (
            "dolomite",
            {"position_embedding_type": "alibi"},
            r"position_embedding_type='alibi'; .*rope",
        ),
        (
            "dolomite",
            {"normalization_function": "layernorm"},
            r"normalization_function='layernorm'",
        ),
        ("dolomite", {"n_head": 2}, r"do not fit attention_head_type='mha' and 2 heads"),
        (
            "dolomite",
            {"attention_head_type": "gqa", "num_key_value_heads": 2},
            r"does not fit the shapes \[96, 32\] of transformer\.h\.0\.attn\.c_attn\.weight",
        ),
        ("dolomite", {"n_embd": ...}, r"config\.json has no hidden_size or n_embd"),
        ("dolomite", {"n_layer": 3}, r"no tensor transformer\.h\.2\.attn\.c_attn\.weight"),
        ("dolomite", {"n_layer": 1}, r"tensors that config\.json does not: transformer\.h\.1\."),
        ("dolomite", {"n_head": 8}, r"num_key_value_heads=4 do not fit attention_head_type='mha'"),
        ("dolomite", {"model_type": "llama"}, None),
        (
            "lm_engine",
            {"last mlp": {"intermediate_size": 8}},
            r"intermediate_size is not the same in all layers",
        ),
        (
            "lm_engine",
            {"mixers": {"attention_gate": True}},
            r"attention_gate=True; .* or False",
        ),
        ("lm_engine", {"mixers": {"head_dim": 16}}, r"head_dim=16; .* None or 8"),
        (
            "lm_engine",
            {"mixers": {"sequence_mixer_type": "mamba2"}},
            r"sequence_mixer_type='mamba2'; .* 'softmax_attention'",
        ),
    ],
    ids=str,
)
def test_what_the_classes_do_not_have_is_refused(theirs, layout, changes, message, tmp_path):
    config, weights = theirs[layout]
    config = json.loads(json.dumps(config))
    for name, value in changes.items():
        if name == "mixers":
            config["sequence_mixer_blocks"] = [b | value for b in config["sequence_mixer_blocks"]]
        elif name == "last mlp":
            config["mlp_blocks"][-1] |= value
        elif value is ...:
            del config[name]
        else:
            config[name] = value
    path = written(tmp_path / "in", config, weights)
    if message is None:  # what the tensors are counts, not what the file is called
        convert(path, str(tmp_path / "out"), to_hugging_face)
        return
    with pytest.raises(ValueError, match=message) as error:
        convert(path, str(tmp_path / "out"), to_hugging_face)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_models_and_folders_in_use_are_refused(theirs, tmp_path):
    config, weights = theirs["dolomite"]
    path = written(tmp_path / "in", config, weights)
    with pytest.raises(
        ValueError, match=r"model_type='gpt_dolomite'; this converts llama, granite"
    ):
        convert(path, str(tmp_path / "out"), to_dolomite)
    with pytest.raises(
        ValueError, match=r"fit the shapes .* of model\.layers\.0\.self_attn\.q_proj"
    ):
        convert(path, str(tmp_path / "llama"), to_hugging_face)
        wrong = about(tmp_path / "llama") | {"num_key_value_heads": 2}
        own = written(tmp_path / "own", wrong, tensors(tmp_path / "llama"))
        convert(own, str(tmp_path / "out"), to_dolomite)
    with pytest.raises(ValueError, match=r"not a checkpoint of dolomite-engine"):
        empty = written(tmp_path / "empty", config, {"a": torch.zeros(1)})
        convert(empty, str(tmp_path / "out"), to_hugging_face)
    with pytest.raises(ValueError, match=r"to=.*: it exists already"):
        convert(path, path, to_hugging_face)
    with pytest.raises(ValueError, match=r"path=.*there is no folder"):
        convert(str(tmp_path / "no such/folder"), str(tmp_path / "out"), to_hugging_face)
