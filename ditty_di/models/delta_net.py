"""DeltaNet layers beside attention: OLMo-Hybrid without the gates of its linear attention.

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
(arXiv 2406.06484). The state of a head `[key_dim, value_dim]` is corrected by each token and never
decays: `S = S + beta * k (v - S^T k)^T`. That is the gated delta rule with a gate of 1, so its
kernels (flash-linear-attention's on CUDA) and its plain form in torch are used. Queries, keys and
values pass a short convolution, queries and keys are normalized.

This file needs torch and transformers alone: exports carry it as their code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import (
    OlmoHybridForCausalLM,
    OlmoHybridModel,
    OlmoHybridRMSNorm,
    causal_conv1d_fn,
    causal_conv1d_update,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)


class DeltaNetConfig(OlmoHybridConfig):
    """Configuration of OLMo-Hybrid; `linear_allow_neg_eigval` doubles `beta` (0 to 2)."""

    model_type = "delta_net"


class DeltaNet(nn.Module):
    """Linear attention by the delta rule."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.activation = layer_idx, config.hidden_act
        self.kernel_size = config.linear_conv_kernel_dim
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys = config.linear_num_key_heads * self.key_dim
        values = config.linear_num_value_heads * self.value_dim
        self.widths = [keys, keys, values]
        self.max_beta = 2.0 if config.linear_allow_neg_eigval else 1.0
        self.q_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, values, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        channels = sum(self.widths)
        self.conv1d = nn.Conv1d(
            channels,
            channels,
            self.kernel_size,
            groups=channels,
            padding=self.kernel_size - 1,
            bias=False,
        )
        self.o_norm = OlmoHybridRMSNorm(self.value_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the output `[batch, seq, hidden]`.

        Args:
            hidden_states: `[batch, seq, hidden]`.
            cache_params: holds the last inputs of the convolution, and the state.
            attention_mask: `[batch, seq]`; 0 is padding.
            **kwargs: `seq_idx` and `cu_seq_lens_q` of packed documents, for kernels.
        """
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        batch, seq = hidden_states.shape[:2]
        past_inputs = state = None
        if cache_params is not None:
            past_inputs = cache_params.get_conv_state(self.layer_idx, state_idx=0)
            state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        projected = [linear(hidden_states) for linear in (self.q_proj, self.k_proj, self.v_proj)]
        mixed = torch.cat(projected, dim=-1).transpose(1, 2)  # [batch, channels, seq]
        weight = self.conv1d.weight.squeeze(1)
        if past_inputs is not None and seq == 1:
            mixed = causal_conv1d_update(mixed, past_inputs, weight, None, self.activation)
        else:
            if cache_params is not None:
                mixed = cache_params.update_conv_state(
                    mixed, self.layer_idx, conv_kernel_size=self.kernel_size
                )
            mixed = causal_conv1d_fn(mixed, weight, None, activation=self.activation, **kwargs)
            mixed = mixed[:, :, -seq:]  # without the inputs of the cache
        query, key, value = mixed.transpose(1, 2).split(self.widths, dim=-1)
        beta = self.b_proj(hidden_states).sigmoid() * self.max_beta  # [batch, seq, heads]
        rule = torch_chunk_gated_delta_rule
        if state is not None and seq == 1:
            rule = torch_recurrent_gated_delta_rule
        output, state = rule(
            query.reshape(batch, seq, -1, self.key_dim),
            key.reshape(batch, seq, -1, self.key_dim),
            value.reshape(batch, seq, -1, self.value_dim),
            g=torch.zeros_like(beta, dtype=torch.float32),
            beta=beta,
            initial_state=state,
            output_final_state=cache_params is not None,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=kwargs.pop("cu_seq_lens_q", None),
            **kwargs,
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        return self.o_proj(self.o_norm(output).reshape(batch, seq, -1))


class DeltaNetModel(OlmoHybridModel):
    """The decoder without an output head."""

    config_class = DeltaNetConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            if config.layer_types[number] == "linear_attention":
                layer.linear_attn = DeltaNet(config, number)
        self.post_init()


class DeltaNetForCausalLM(OlmoHybridForCausalLM):
    """The decoder with an output head."""

    config_class = DeltaNetConfig

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.post_init()


DeltaNetConfig.register_for_auto_class()
DeltaNetForCausalLM.register_for_auto_class("AutoModelForCausalLM")
