"""Two ranks export a sharded, recomputed model; rank 0 also the same model unsharded."""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ditty_di.assembly import place_model
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.recompute import full
from ditty_di.runtime import Runtime
from ditty_di.tasks.export import HuggingFaceExport


def main(folder):
    runtime = Runtime()
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    options = {
        "runtime": runtime,
        "loss_fn": CrossEntropyLoss(output="logits"),
        "weights": partial(initialize, seed=1, init=hugging_face),
        "pipeline_fn": None,
    }
    sharding = partial(shard, recompute=full, reshard_after_forward=False)
    (sharded,) = place_model(from_config(config), parallelize_fn=sharding, **options).modules
    (whole,) = place_model(
        from_config(config), parallelize_fn=lambda model, **_: model, **options
    ).modules
    with torch.no_grad():  # leaves the outermost parameters gathered
        sharded(torch.zeros(1, 3, dtype=torch.long))
    HuggingFaceExport(tokenizer, str(folder / "sharded"))([sharded])
    # `gathered` asks for nobody else when nothing is sharded.
    HuggingFaceExport(tokenizer, str(folder / "whole"))([whole])
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    # gloo's threads may outlive the interpreter and abort it (pytorch/pytorch#179291).
    os._exit(0)
