"""Hugging Face causal language models, built on the meta device."""

from __future__ import annotations

from contextlib import suppress

from ditty_di.models.hugging_face import builders

# isort: split
from transformers import AutoConfig, AutoModelForCausalLM

import ditty_di.models.dense_moe  # noqa: F401  # registers itself
from ditty_di.models.cross_layer import CrossLayerConfig, CrossLayerForCausalLM

AutoConfig.register(CrossLayerConfig.model_type, CrossLayerConfig)
AutoModelForCausalLM.register(CrossLayerConfig, CrossLayerForCausalLM)

with suppress(ImportError):  # an older transformers has no OLMo-Hybrid, which it changes
    from ditty_di.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM

    AutoConfig.register(DeltaNetConfig.model_type, DeltaNetConfig)
    AutoModelForCausalLM.register(DeltaNetConfig, DeltaNetForCausalLM)

# inputs [batch, seq] -> logits [batch, seq, vocab]
from_config, from_pretrained = builders(AutoModelForCausalLM, contract="0:2:i64 -> logits:3:f")
