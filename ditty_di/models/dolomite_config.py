"""Configurations of dolomite-engine and lm-engine as those of transformers, and back.

`entries` are a configuration by transformers' names, where a multiplier that is not used is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import AutoConfig, GraniteConfig, GraniteMoeConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Entries by their names in transformers, lm-engine and dolomite-engine.
_NAMES = (
    ("vocab_size", "vocab_size", "vocab_size"),
    ("max_position_embeddings", "max_position_embeddings", "n_positions"),
    ("hidden_size", "hidden_size", "n_embd"),
    ("num_hidden_layers", "num_layers", "n_layer"),
    ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_epsilon"),
    ("initializer_range", "initializer_range", "initializer_range"),
    ("rope_theta", "rope_theta", "rope_theta"),
)
#: Entries that transformers leaves out of a file where they have these values.
_OPTIONAL = {
    "use_cache": True,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "router_aux_loss_coef": 0.001,
}
#: Multipliers; None is 1, and of attention 1 / sqrt(size of a head).
_MULTIPLIERS = {
    "embedding_multiplier": "m_emb",
    "residual_multiplier": "m_residual",
    "logits_scaling": "m_width",
}
_CLASSES = (LlamaConfig, GraniteConfig, GraniteMoeConfig)
_NEEDED: Any = object()


def _shared(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that dolomite-engine and lm-engine have under the same names."""
    return {
        "normalization_function": "rmsnorm",
        "position_embedding_type": "rope",
        "rope_scaling": entries["rope_scaling"],
        **{own: entries[theirs] for theirs, own in _MULTIPLIERS.items()},
        **{name: entries[name] for name in _OPTIONAL},
        "torch_dtype": entries["dtype"],
    }


def from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration of transformers."""
    kind = config.get("model_type")
    if kind not in [known.model_type for known in _CLASSES]:
        raise ValueError(
            f"config.json: model_type={kind!r}; this converts llama, granite and granitemoe"
        )
    own: Any = AutoConfig.for_model(**config)
    head = own.hidden_size // own.num_attention_heads
    if (getattr(own, "head_dim", None) or head) != head:
        raise ValueError(
            f"config.json: head_dim={own.head_dim}; write a model whose heads are {head}"
        )
    if own.hidden_act != "silu":
        raise ValueError(f"config.json: hidden_act={own.hidden_act!r}; this converts 'silu' alone")
    rope = dict(own.rope_parameters)
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    entries = {
        **{name: getattr(own, name, value) for name, value in _OPTIONAL.items()},
        "dtype": _value(config, (), "dtype", "torch_dtype", default=None),
        **{name: getattr(own, name) for name, _, _ in _NAMES if name != "rope_theta"},
        "rope_theta": theta,
        "rope_scaling": {"rope_type": rope_type, **rope}
        if rope or rope_type != "default"
        else None,
        "num_attention_heads": own.num_attention_heads,
        "num_key_value_heads": own.num_key_value_heads,
        "intermediate_size": own.intermediate_size,
        "attention_dropout": own.attention_dropout,
        "attention_bias": own.attention_bias,
        "mlp_bias": getattr(own, "mlp_bias", False),
        "num_local_experts": getattr(own, "num_local_experts", None),
        "num_experts_per_tok": getattr(own, "num_experts_per_tok", None),
        "attention_multiplier": getattr(own, "attention_multiplier", None),
    }
    multipliers = {name: getattr(own, name, 1) for name in _MULTIPLIERS}
    return entries | {name: None if value == 1 else value for name, value in multipliers.items()}


def from_either(config: Mapping[str, Any], moe: bool) -> tuple[dict[str, Any], bool]:
    """Return the entries by transformers' names, and whether rows of up and gate alternate."""
    mixers = config.get("sequence_mixer_blocks") or config.get("attention_blocks") or ()
    mlps = config.get("mlp_blocks") or ()
    get, of_mixer, of_mlp = (partial(_value, config, blocks) for blocks in ((), mixers, mlps))
    entries = {theirs: get(*own) for theirs, *own in _NAMES}
    entries |= {name: get(name, default=value) for name, value in _OPTIONAL.items()}
    entries |= {"dtype": get("dtype", "torch_dtype", default=None)}
    entries |= {"rope_scaling": get("rope_scaling", default=None)}
    entries |= {theirs: get(own, default=None) for theirs, own in _MULTIPLIERS.items()}
    _only(get, "normalization_function", "rmsnorm")
    _only(get, "position_embedding_type", "rope")

    _only(of_mixer, "sequence_mixer_type", "softmax_attention", default="softmax_attention")
    _only(of_mixer, "attention_block_type", "softmax_attention", default="softmax_attention")
    for name in ("attention_gate", "exclusive_self_attention", "sliding_window"):
        _only(of_mixer, name, None, False, default=None)
    heads = of_mixer("num_attention_heads", "n_head")
    kinds = {"mha": heads, "mqa": 1, "gqa": None}
    kind = _only(of_mixer, "attention_head_type", *kinds, default="gqa")
    kv_heads = of_mixer("num_key_value_heads", default=None) or kinds[kind]
    if not kv_heads or heads % kv_heads or kinds[kind] not in (None, kv_heads):
        raise ValueError(
            f"config.json: num_key_value_heads={kv_heads} do not fit attention_head_type={kind!r} "
            f"and {heads} heads"
        )
    head = entries["hidden_size"] // heads
    for name in ("head_dim", "rope_dim"):
        _only(of_mixer, name, None, head, default=None)
    bias = of_mixer("add_bias")
    _only(of_mixer, "qkv_bias", None, bias, default=None)
    scales = {"1 / sqrt(head_dim)": None, "1 / head_dim": 1 / head, None: None}
    method = _only(of_mixer, "attention_multiplier_method", *scales, default=None)
    multiplier = of_mixer("attention_multiplier", default=None) or scales[method]
    if not get("scale_attn_weights", default=True):
        multiplier = 1.0

    _only(of_mlp, "activation_function", "swiglu")
    _only(of_mlp, "shared_intermediate_size", None, 0, default=None)
    _only(of_mlp, "shared_n_inner", None, 0, default=None)
    _only(of_mlp, "normalized_topk", True, default=True)
    mlp_bias = of_mlp("add_bias")
    if moe and (bias or mlp_bias):
        raise ValueError("config.json: add_bias=true; the GraniteMoe of transformers has no biases")
    inner = of_mlp("intermediate_size", "n_inner") or 4 * entries["hidden_size"]
    flag = "use_interleaved_weights_for_moe" if moe else "use_interleaved_weights"
    return entries | {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "attention_dropout": of_mixer("softmax_dropout", "attn_pdrop", default=0.0),
        "attention_bias": bias,
        "mlp_bias": mlp_bias,
        "num_local_experts": of_mlp("num_experts") if moe else None,
        "num_experts_per_tok": of_mlp("num_experts_per_tok") if moe else None,
        "attention_multiplier": multiplier,
    }, bool(of_mlp(flag, default=False))


def _value(
    config: Mapping[str, Any],
    blocks: Sequence[Mapping[str, Any]],
    *names: str,
    default: Any = _NEEDED,
) -> Any:
    """Return the first entry of these names, of all layers' blocks or else of the configuration."""
    for name in names:
        found = [block[name] for block in blocks if name in block]
        if found:
            if len(found) < len(blocks) or any(one != found[0] for one in found):
                raise ValueError(
                    f"config.json: {name} is not the same in all layers, as it is in the classes "
                    f"of transformers"
                )
            return found[0]
        if name in config:
            return config[name]
    if default is _NEEDED:
        raise ValueError(f"config.json has no {' or '.join(dict.fromkeys(names))}")
    return default


def _only(get: Callable[..., Any], name: str, *allowed: Any, default: Any = _NEEDED) -> Any:
    """Return an entry; raise ValueError if transformers' classes have other values alone."""
    value = get(name, default=default)
    if value not in allowed:
        raise ValueError(
            f"config.json: {name}={value!r}; the Llama, Granite and GraniteMoe of transformers "
            f"have {' or '.join(repr(one) for one in allowed)}"
        )
    return value


def transformers_config(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for transformers."""
    new = {**entries, "rope_parameters": {"rope_type": "default"} | (entries["rope_scaling"] or {})}
    if "type" in new["rope_parameters"]:  # its name before transformers 4.43
        new["rope_parameters"]["rope_type"] = new["rope_parameters"].pop("type")
    new["rope_parameters"]["rope_theta"] = new.pop("rope_theta")
    del new["rope_scaling"]
    multipliers = {name: new.pop(name) for name in (*_MULTIPLIERS, "attention_multiplier")}
    experts = {n: new.pop(n) for n in ("num_local_experts", "num_experts_per_tok")}
    coefficient = new.pop("router_aux_loss_coef")
    make: Any = LlamaConfig
    if experts["num_local_experts"] or any(value is not None for value in multipliers.values()):
        make = GraniteConfig
        usual = (new["hidden_size"] // new["num_attention_heads"]) ** -0.5
        multipliers["attention_multiplier"] = multipliers["attention_multiplier"] or usual
        new |= {name: 1.0 if value is None else value for name, value in multipliers.items()}
    if experts["num_local_experts"]:
        make = GraniteMoeConfig
        new |= {**experts, "router_aux_loss_coef": coefficient}
        del new["mlp_bias"]
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[make.model_type]
    return make(**new, architectures=[name]).to_diff_dict()


def dolomite_config(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for dolomite-engine.

    Raises:
        ValueError: biases in one kind of projection alone.
    """
    if entries["attention_bias"] != entries["mlp_bias"]:
        raise ValueError(
            "config.json: attention_bias and mlp_bias differ, and dolomite-engine has one add_bias "
            "for both; write conversion=lm_engine"
        )
    heads, kv_heads = entries["num_attention_heads"], entries["num_key_value_heads"]
    experts = entries["num_local_experts"]
    new = {
        "model_type": "moe_dolomite" if experts else "gpt_dolomite",
        "architectures": ["MoEDolomiteForCausalLM" if experts else "GPTDolomiteForCausalLM"],
        **{own: entries[theirs] for theirs, _, own in _NAMES},
        **_shared(entries),
        "n_head": heads,
        "num_key_value_heads": kv_heads,
        "attention_head_type": "mha" if kv_heads == heads else "mqa" if kv_heads == 1 else "gqa",
        "attention_multiplier": entries["attention_multiplier"],
        "attn_pdrop": entries["attention_dropout"],
        "embd_pdrop": 0,
        "resid_pdrop": 0,
        "n_inner": entries["intermediate_size"],
        "activation_function": "swiglu",
        "add_bias": entries["attention_bias"],
    }
    if experts:
        new |= {"num_experts": experts, "num_experts_per_tok": entries["num_experts_per_tok"]}
    return new


def lm_engine_config(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for lm-engine."""
    layers, experts = entries["num_hidden_layers"], entries["num_local_experts"]
    mixer = {
        "sequence_mixer_type": "softmax_attention",
        "num_attention_heads": entries["num_attention_heads"],
        "num_key_value_heads": entries["num_key_value_heads"],
        "attention_multiplier": entries["attention_multiplier"],
        "softmax_dropout": entries["attention_dropout"],
        "add_bias": entries["attention_bias"],
    }
    mlp = {
        "mlp_type": "MoE" if experts else "MLP",
        "intermediate_size": entries["intermediate_size"],
        "activation_function": "swiglu",
        "add_bias": entries["mlp_bias"],
    }
    if experts:
        mlp |= {"num_experts": experts, "num_experts_per_tok": entries["num_experts_per_tok"]}
    return {
        "model_type": "gpt_base",
        "architectures": ["GPTBaseForCausalLM"],
        **{own: entries[theirs] for theirs, own, _ in _NAMES},
        **_shared(entries),
        "sequence_mixer_blocks": [mixer] * layers,
        "mlp_blocks": [mlp] * layers,
    }
