"""Bases in folders, and models as training has them: on both sides of a process boundary."""

import torch


def llama(folder, tokenizer, dtype=torch.float32, **config):
    """Writes a Llama with strong random weights, as if it had been published; its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(shape | ids | config)))
    return _published(made.to(dtype), folder, tokenizer)


def t5(folder, tokenizer, **config):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(3)
    shape = {
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "initializer_factor": 1.0,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    made = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **(shape | ids | config)))
    return _published(made, folder, tokenizer)


def _published(model, folder, tokenizer):
    model.generation_config.repetition_penalty = 1.25  # something that no config.json says
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
