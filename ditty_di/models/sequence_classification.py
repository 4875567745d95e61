"""Hugging Face models that classify a text, or a pair of texts, built on the meta device."""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification

from ditty_di.models.hugging_face import builders

# inputs, attention_mask [batch, seq] -> logits [batch, classes]
from_config, from_pretrained = builders(
    AutoModelForSequenceClassification,
    contract="0:2:i64, attention_mask:2:i64 -> logits:2:f",
    pipeline_tag="text-classification",
    head_task="SEQ_CLS",
)
