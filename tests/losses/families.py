"""Tiny real models of several families, with every value away from its initial zero or one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 97

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
#: The last four do something to their hidden states or logits around the output projection.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama-tied": {**_LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "output_router_logits": True},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {**_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {**_LLAMA, "head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {**_LLAMA, "logit_scale": 0.3},
    "granite": {**_LLAMA, "logits_scaling": 4.0},
    "bart": _BART,
    "t5": _T5,
}
SEQ2SEQ = ("bart", "t5")


def build(family: str, **changes: Any) -> Any:
    """A model in evaluation mode, with its values."""
    import transformers

    options = {**FAMILIES[family], **changes}
    kind = options.pop("model_type", family)
    config = transformers.AutoConfig.for_model(kind, **options)
    config.use_cache = False
    auto = "Seq2SeqLM" if family in SEQ2SEQ else "CausalLM"
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model.eval()


def batch(family: str, rows: int = 2, seq: int = 13) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by the names of `forward`, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(1)

    def ids() -> Tensor:
        return torch.randint(3, VOCAB, (rows, seq), generator=generator)

    inputs = {"input_ids": ids()}
    if family in SEQ2SEQ:
        inputs |= {"decoder_input_ids": ids(), "attention_mask": torch.ones(rows, seq).long()}
    labels = ids()
    labels[0, : seq // 2] = -100
    return inputs, labels
