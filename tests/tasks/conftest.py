"""A tiny trained-looking model with its tokenizer and checkpoint."""

from functools import partial

import pytest
import torch

from ditty_di.checkpoint import Checkpointer
from ditty_di.checkpoint.model_state import ModelState
from ditty_di.checkpoint.read import from_checkpoint
from ditty_di.data import train_bpe
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import hugging_face, initialize, materialize
from ditty_di.runtime import Runtime


def text(number):
    return f"Document {number} says that {number + 1} follows, and {number - 1} does not."


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    documents = [text(i) for i in range(50)]
    return train_bpe(documents, 300, model_max_length=96, cache_dir=tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def build(tokenizer):
    """Builds the model on meta."""
    from tests.models.tiny import llama

    config = llama(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        max_position_embeddings=96,
        initializer_range=0.5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return partial(from_config, config)


@pytest.fixture(scope="session")
def initial():
    return partial(initialize, seed=1, init=hugging_face)


@pytest.fixture(scope="session")
def checkpoint(build, initial, tmp_path_factory):
    """The weights slot that reads a checkpoint of the model, with other values than `initial`."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    model, device = build(), torch.device("cpu")
    materialize(model, device)
    initialize(model, device=device, seed=2, init=hugging_face)
    runtime = Runtime()
    saver = Checkpointer(folder, states={"model": ModelState([model])}, rank_states={})
    saver.save(7, force=True)
    saver.close()
    runtime.close()
    return partial(from_checkpoint, path=folder, initialize=initial)
