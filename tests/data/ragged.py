"""Tiny models and documents of different lengths, for comparing batches with documents alone."""

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

VOCAB = 64
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


def make_model(architecture, attention, **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        CONFIGS[architecture], attn_implementation=attention, **config
    )


class Documents:
    """Documents of random tokens, of which the first third are no labels."""

    def __init__(self, lengths, seed=0):
        self.lengths = np.array(lengths)
        rng = np.random.default_rng(seed)
        self.ids = [torch.from_numpy(rng.integers(0, VOCAB, n + 1)) for n in lengths]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = self.ids[index]
        labels = ids[1:].clone()
        labels[: len(labels) // 3] = -100
        return {"input": ids[:-1]}, labels


def run(model, inputs):
    return model(inputs["input"], **{k: v for k, v in inputs.items() if k != "input"}).logits
