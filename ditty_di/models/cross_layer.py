"""A Llama whose layers share keys and values: cross-layer attention.

Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention"
(arXiv 2405.12981): only some layers compute keys and values; the others attend to those of the
last layer that did, so the cache holds those layers only.

This file needs torch and transformers alone: exports carry it as their code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class CrossLayerConfig(LlamaConfig):
    """Configuration of Llama, and which layers compute keys and values.

    Args:
        key_value_layers: `own` or `shared` for each layer; a shared layer takes the keys and values
            of the last layer with its own. None: every other layer (the paper's CLA2).

    Raises:
        ValueError: another word or number of layers, or a first layer without keys and values.
    """

    model_type = "cross_layer_llama"
    key_value_layers: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        layers = self.num_hidden_layers
        if self.key_value_layers is None:
            self.key_value_layers = [("own", "shared")[layer % 2] for layer in range(layers)]
        kinds = self.key_value_layers
        if len(kinds) != layers or not set(kinds) <= {"own", "shared"} or kinds[0] != "own":
            raise ValueError(
                f"key_value_layers={kinds}: write own or shared for each of the {layers} layers "
                f"(num_hidden_layers), and own for the first"
            )
        super().__post_init__(**kwargs)


class CrossLayerAttention(LlamaAttention):
    """Attention of Llama, to keys and values of its own or of an earlier layer."""

    def __init__(self, config: CrossLayerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.owns_key_values = (config.key_value_layers or [])[layer_idx] == "own"
        if not self.owns_key_values:
            del self.k_proj, self.v_proj

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        key_values: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Return the output `[batch, seq, hidden]`, the attention weights, keys and values.

        Args:
            hidden_states: `[batch, seq, hidden]`.
            position_embeddings: cosines and sines.
            attention_mask: of the attention function.
            past_key_values: cache; layers without keys and values of their own leave it alone.
            key_values: of an earlier layer, each `[batch, heads, seq, head_dim]`.
            **kwargs: passed to the attention function.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # [batch, heads, seq, dim]
        if self.owns_key_values:
            key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
            value = self.v_proj(hidden_states).view(shape).transpose(1, 2).contiguous()
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        else:
            assert key_values is not None, "the first layer has keys and values of its own"
            query, _ = apply_rotary_pos_emb(query, query[:, :1], *position_embeddings)
            key, value = key_values
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(output), weights, (key, value)


class CrossLayerDecoderLayer(LlamaDecoderLayer):
    """A block of Llama that hands keys and values on."""

    def __init__(self, config: CrossLayerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = CrossLayerAttention(config, layer_idx)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        key_values: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the hidden states `[batch, seq, hidden]` and the newest keys and values.

        Args:
            hidden_states: `[batch, seq, hidden]`.
            key_values: of the last layer that computed them; None in the first.
            **kwargs: of the attention.
        """
        attended, _, key_values = self.self_attn(
            self.input_layernorm(hidden_states), key_values=key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), key_values


class CrossLayerPreTrainedModel(LlamaPreTrainedModel):
    """What models of this kind have in common."""

    config_class = CrossLayerConfig
    _no_split_modules = ["CrossLayerDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CrossLayerDecoderLayer,
        "attentions": CrossLayerAttention,
    }


class CrossLayerModel(CrossLayerPreTrainedModel):
    """The decoder without an output head."""

    def __init__(self, config: CrossLayerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            CrossLayerDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states `[batch, seq, hidden]`; arguments as of Llama.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            at = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            position_ids = (at + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        key_values = None
        for layer in self.layers:
            hidden_states, key_values = layer(
                hidden_states,
                key_values=key_values,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class CrossLayerForCausalLM(CrossLayerPreTrainedModel, GenerationMixin):
    """The decoder with an output head."""

    _tied_weights_keys = LlamaForCausalLM._tied_weights_keys
    _tp_plan = LlamaForCausalLM._tp_plan
    _fsdp_plan = LlamaForCausalLM._fsdp_plan
    forward = LlamaForCausalLM.forward

    def __init__(self, config: CrossLayerConfig) -> None:
        super().__init__(config)
        self.model = CrossLayerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


CrossLayerConfig.register_for_auto_class()
CrossLayerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
