"""Hugging Face models without a head, for embeddings, built on the meta device."""

from __future__ import annotations

from transformers import AutoModel

from ditty_di.models.hugging_face import builders

# inputs, attention_mask [batch, seq] -> last_hidden_state [batch, seq, hidden]
from_config, from_pretrained = builders(
    AutoModel,
    contract="0:2:i64, attention_mask:2:i64 -> last_hidden_state:3:f",
    pipeline_tag="sentence-similarity",
    head_task="FEATURE_EXTRACTION",
    unused=["pooler"],
)
