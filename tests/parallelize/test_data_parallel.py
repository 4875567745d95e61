"""Recomputation, compiling and precision change how a step is computed, not what."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.names import canonical_fqn
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.recompute import full, selective
from ditty_di.runtime import Runtime
from tests.distributed.cases import make_trainer


@pytest.fixture
def runtime():
    runtime = Runtime(seed=0)
    yield runtime
    runtime.close()


def run(**options):
    trainer, recorder = make_trainer(
        None, steps=4, dropout=0.1, parallelize_fn=partial(shard, **options)
    )
    trainer.train()
    return recorder.losses(), trainer


@pytest.mark.parametrize("recompute", [full, selective, partial(selective, matmul_every=1)])
def test_recomputed_activations_give_the_same_losses_and_names(runtime, recompute):
    plain, trainer = run()
    recomputed, wrapped = run(recompute=recompute)
    assert recomputed == plain
    names = [
        [canonical_fqn(n) for n, _ in t.model_parts[0].named_parameters()]
        for t in (trainer, wrapped)
    ]
    assert names[0] == names[1]


def test_every_second_block_is_recomputed(runtime):
    _, trainer = run(recompute=full, recompute_every=2)
    wrapped = [
        hasattr(b, "_checkpoint_wrapped_module") for b in trainer.model_parts[0].model.layers
    ]
    assert wrapped == [True, False]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(runtime):
    def losses(**options):
        trainer, recorder = make_trainer(None, steps=4, parallelize_fn=partial(shard, **options))
        trainer.train()
        return recorder.losses()

    assert losses(compile={}) == pytest.approx(losses(), abs=1e-4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(runtime):
    (*losses,), trainer = run(param_dtype="bfloat16", reduce_dtype="float32")
    (*exact,), _ = run()
    assert losses != exact
    assert losses == pytest.approx(exact, abs=0.05)
    assert {p.dtype for p in trainer.model_parts[0].parameters()} == {torch.float32}


def test_the_repeated_blocks_are_found_and_can_be_named(runtime):
    model = nn.ModuleDict(
        {
            "a": nn.ModuleList([nn.Linear(2, 2)]),
            "b": nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)]),
        }
    )
    wrapped: list[nn.Module] = []

    def note(block):
        wrapped.append(block)
        return block

    shard(model["b"], parallel_dims=runtime.parallel_dims, recompute=note)
    assert wrapped == list(model["b"])
    wrapped.clear()
    shard(model, parallel_dims=runtime.parallel_dims, recompute=note, blocks="a")
    assert wrapped == list(model["a"])
    for path, message in (("c", "has no attribute"), ("a.0", "has no modules in it")):
        with pytest.raises(ValueError, match=message):
            shard(model, parallel_dims=runtime.parallel_dims, blocks=path)


def test_on_one_rank_without_a_dtype_nothing_is_sharded(runtime):
    _, trainer = run()
    assert not hasattr(trainer.model_parts[0], "unshard")
