"""Hugging Face causal language models, built on the meta device."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from ditty_di.models.hugging_face import builders

# isort: split
import ditty_di.models.dense_moe  # noqa: F401  # so that its exports open without remote code

# inputs [batch, seq] -> logits [batch, seq, vocab]
from_config, from_pretrained = builders(AutoModelForCausalLM, contract="0:2:i64 -> logits:3:f")
