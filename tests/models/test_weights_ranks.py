"""Random values are those of the seed and the names, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

from ditty_di.models import causal_lm, seq2seq
from ditty_di.models.weights import hugging_face, initialize, materialize, unset
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from tests.checkpoint import ranks
from tests.models.test_weights import llama

SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
MODELS = {
    "llama": lambda: causal_lm.from_config(llama()),
    "t5": lambda: seq2seq.from_config(T5Config(**SMALL, decoder_start_token_id=0)),
    "t5, not tied": lambda: seq2seq.from_config(
        T5Config(**SMALL, decoder_start_token_id=0, tie_word_embeddings=False)
    ),
}


def values():
    """The parameters of every model, whole."""
    runtime = Runtime()
    found = {}
    for name, make in MODELS.items():
        model = shard(make(), parallel_dims=runtime.parallel_dims)
        materialize(model, runtime.device)
        initialize(model, device=runtime.device, seed=3, init=hugging_face)
        assert not unset(model)
        found[name] = {
            key: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy()
            for key, p in model.named_parameters()
        }
    runtime.close()
    return found


@pytest.fixture(scope="module")
def runs():
    """One process group for all models: processes are slow to start."""
    (one,), two = ranks.run(values, 1), ranks.run(values, 2)
    return one, *two


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_and_two_begin_alike(runs, name):
    one, two, same = (found[name] for found in runs)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (value == two[key]).all() and (value == same[key]).all(), key
    if "t5" in name:  # which its whole model initializes, and not its embedding
        assert torch.from_numpy(one["shared.weight"]).std().item() == pytest.approx(1.0, rel=0.1)
