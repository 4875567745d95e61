"""Hugging Face masked language models, built on the meta device."""

from __future__ import annotations

from transformers import AutoModelForMaskedLM

from ditty_di.models.hugging_face import builders

# inputs, attention_mask [batch, seq] -> logits [batch, seq, vocab]
from_config, from_pretrained = builders(
    AutoModelForMaskedLM,
    contract="0:2:i64, attention_mask:2:i64 -> logits:3:f",
    pipeline_tag="fill-mask",
)
