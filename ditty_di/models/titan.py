"""torchtitan's Llama 3, built on meta from a few numbers instead of a named flavour."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import ditty_di.compat  # noqa: F401
from ditty_di.models.weights import initialize, torchtitan

if TYPE_CHECKING:
    from torchtitan.models.llama3 import Llama3Model


#: tokens [batch, seq] -> logits [batch, seq, vocab]
CONTRACT = "0:2:i64 -> logits:3:f"


def llama3(
    *,
    vocab_size: int,
    dim: int,
    n_layers: int,
    n_heads: int,
    max_seq_len: int,
    n_kv_heads: int | None = None,
    hidden_dim: int | None = None,
    rope_theta: float = 10000.0,
    inner_attention: Any = None,
) -> Llama3Model:
    """A Llama 3 of torchtitan with its own initialisers; `weights: torchtitan` runs them.

    Args:
        hidden_dim: of the feed-forward layers; 8/3 of `dim`, rounded up to 64, when None.
        inner_attention: a torchtitan attention configuration; None is scaled dot-product
            attention, the one that also trains on a CPU.

    The standard deviations are torchtitan's (`models/llama3/__init__.py`): 0.02 for input
    projections, 0.02 / sqrt(2 * (layer + 1)) for output projections, 1 / sqrt(dim) for the head.
    """
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.common.param_init import depth_scaled_std
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    hidden_dim = hidden_dim or (8 * dim // 3 + 63) // 64 * 64
    ones = {"weight": nn.init.ones_}

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=dim, param_init=ones)

    def block(layer: int) -> Llama3TransformerBlock.Config:
        entering, leaving = _normal(0.02), _normal(depth_scaled_std(0.02, layer))
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=dim,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                wqkv_param_init=entering,
                wo_param_init=leaving,
                inner_attention=inner_attention or ScaledDotProductAttention.Config(),
                fuse_qkv=True,
                rope=ComplexRoPE.Config(
                    dim=dim // n_heads, max_seq_len=max_seq_len, theta=rope_theta
                ),
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=hidden_dim, w1_param_init=entering, w2w3_param_init=leaving
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
    with torch.device("meta"):
        model: Any = config.build()
    model.contract = CONTRACT
    model.default_weights = partial(initialize, init=torchtitan)
    return model


llama3.contract = CONTRACT  # type: ignore[attr-defined]


def _normal(std: float) -> dict[str, Any]:
    """A normal distribution cut at three standard deviations."""
    return {"weight": partial(nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)}
