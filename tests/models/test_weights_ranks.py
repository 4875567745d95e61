"""Random values are those of the seed and the names, on any number of ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import T5Config

from ditty_di.models import causal_lm, mup, seq2seq
from ditty_di.models.weights import materialize, slices, uninitialized
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from tests.checkpoint import ranks
from tests.models.test_mup import config as mup_config
from tests.models.test_weights import llama

SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
MODELS = {
    "llama": lambda: causal_lm.from_config(llama()),
    "mup": lambda: causal_lm.from_config(mup_config(2), init=mup.init),
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
        model.default_weights(model, device=runtime.device, seed=3)
        assert not uninitialized(model)
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


def pieces():
    """Slices of a tensor of 8 rows, sharded in several ways over two ranks; None if refused."""
    runtime = Runtime()
    line = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (1, 2))
    strided = partial(_StridedShard, 0)
    found = []
    for mesh, placements in (
        (line, [Shard(0)]),
        (line, [strided(split_factor=2)]),  # as of two matrices in one: each rank has half of both
        (square, [strided(split_factor=2), Shard(0)]),  # as of FSDP over tensor parallelism
        (square, [strided(split_factor=4), Shard(0)]),
    ):
        tensor = DTensor.from_local(torch.zeros(4, 3), mesh, placements, run_check=False)
        try:
            found.append(slices(tensor)[0])
        except ValueError as error:
            assert "is not one piece of it" in str(error)
            found.append(None)
    runtime.close()
    return found


def test_slices_are_refused_where_a_rank_has_several_pieces():
    first, second = ranks.run(pieces, 2)
    assert first == [slice(0, 4), None, slice(0, 4), None]
    assert second == [slice(4, 8), None, slice(4, 8), None]


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_and_two_begin_alike(runs, name):
    one, two, same = (found[name] for found in runs)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (value == two[key]).all() and (value == same[key]).all(), key
    if name == "mup":
        std = torch.from_numpy(one["model.layers.0.mlp.up_proj.weight"]).std().item()
        assert std == pytest.approx(0.02 / 2**0.5, rel=0.05)
    if "t5" in name:  # which its whole model initializes, and not its embedding
        assert torch.from_numpy(one["shared.weight"]).std().item() == pytest.approx(1.0, rel=0.1)
