"""torchtitan's Llama 3, built on meta from a few numbers instead of a named flavor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

from ditty_di.models.weights import initialize, torchtitan

#: tokens [batch, seq] -> logits [batch, seq, vocab]
CONTRACT = "0:2:i64 -> logits:3:f"


def llama3(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int | None = None,
    max_seq_len: int | None = None,
    tokenizer: Any = None,
    n_kv_heads: int | None = None,
    hidden_dim: int | None = None,
    rope_theta: float = 10000.0,
    inner_attention: Any = None,
) -> Llama3Model:
    """Build a Llama 3 of torchtitan, whose `default_weights` run its own initializers.

    The standard deviations are torchtitan's (`models/llama3/__init__.py`): 0.02 for input
    projections, 0.02 / sqrt(2 * (layer + 1)) for output projections, 1 / sqrt(dim) for the head.

    Args:
        dim: width of the hidden states.
        n_layers: number of blocks.
        n_heads: attention heads.
        vocab_size: number of tokens; None is the size of `tokenizer`.
        max_seq_len: longest sequence, in tokens; None is the `model_max_length` of `tokenizer`.
        tokenizer: of transformers.
        n_kv_heads: heads of keys and values; None is `n_heads`.
        hidden_dim: width of the feed-forward layers; None is 8/3 of `dim`, rounded up to 64.
        rope_theta: base of the rotary frequencies.
        inner_attention: an attention configuration of torchtitan; None is scaled dot-product
            attention, which also trains on a CPU.
    """
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    max_seq_len = tokenizer.model_max_length if max_seq_len is None else max_seq_len
    hidden_dim = hidden_dim or (8 * dim // 3 + 63) // 64 * 64
    # Each norm has a configuration of its own: the last one is split otherwise.
    norm = partial(RMSNorm.Config, normalized_shape=dim, param_init={"weight": nn.init.ones_})

    def block(layer: int) -> Llama3TransformerBlock.Config:
        inputs, outputs = _normal(0.02), _normal(depth_scaled_std(0.02, layer))
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=dim,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                wqkv_param_init=inputs,
                wo_param_init=outputs,
                inner_attention=inner_attention or ScaledDotProductAttention.Config(),
                fuse_qkv=True,
                rope=ComplexRoPE.Config(
                    dim=dim // n_heads, max_seq_len=max_seq_len, theta=rope_theta
                ),
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=hidden_dim, w1_param_init=inputs, w2w3_param_init=outputs
            ),
        )

    config = Llama3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=dim, param_init=_normal(1.0)
        ),
        norm=norm(),
        lm_head=Linear.Config(
            in_features=dim, out_features=vocab_size, param_init=_normal(dim**-0.5)
        ),
        layers=[block(layer) for layer in range(n_layers)],
    )
    set_llama3_sharding_config(config, enable_sp=True)  # tells how runtime.tp splits it
    with torch.device("meta"):
        model: Any = config.build()
    model.contract = CONTRACT
    model.default_weights = partial(initialize, init=torchtitan)
    return model


llama3.contract = CONTRACT  # type: ignore[attr-defined]


def _normal(std: float) -> dict[str, Any]:
    """Return initializers for a normal distribution cut at three standard deviations."""
    return {"weight": partial(nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)}
