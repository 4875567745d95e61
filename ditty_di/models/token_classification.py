"""Hugging Face models that classify each token of a text, built on the meta device."""

from __future__ import annotations

from transformers import AutoModelForTokenClassification

from ditty_di.models.hugging_face import builders

# inputs, attention_mask [batch, seq] -> logits [batch, seq, classes]
from_config, from_pretrained = builders(
    AutoModelForTokenClassification,
    contract="0:2:i64, attention_mask:2:i64 -> logits:3:f",
    pipeline_tag="token-classification",
    head_task="TOKEN_CLS",
)
