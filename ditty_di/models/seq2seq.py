"""Hugging Face sequence-to-sequence models, built on the meta device."""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM

from ditty_di.models.hugging_face import builders

# inputs [batch, source], decoder_input_ids [batch, target] -> logits [batch, target, vocab]
from_config, from_pretrained = builders(
    AutoModelForSeq2SeqLM,
    contract="0:2:i64, attention_mask:2:i64, decoder_input_ids:2:i64 -> logits:3:f",
    pipeline_tag="text2text-generation",
)
