"""Models of a few thousand parameters, saved as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ditty_di.models.pretrained import Pretrained
from ditty_di.models.weights import materialize, uninitialized

CPU = torch.device("cpu")
TOKENS = torch.arange(12)[None]


def llama(**changes) -> LlamaConfig:
    """Odd numbers of rows, and untied unless `changes` say otherwise."""
    options = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 99,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**options, **changes})


def save_llama(folder: Path, *, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(llama(**changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model.eval()


def fill(model: nn.Module, path: Path | str, **options) -> nn.Module:
    materialize(model, CPU)
    Pretrained(path, **options)(model, device=CPU)
    assert not uninitialized(model)
    return model.eval()


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, **inputs).logits
