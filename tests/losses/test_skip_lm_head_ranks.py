"""Chunked losses under FSDP2: the losses and gradients of whole logits, on any number of ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ditty_di.compat import sum_gradients_on_gloo
from ditty_di.losses import CrossEntropyLoss, LinearCrossEntropyLoss, skip_lm_head
from ditty_di.models.weights import hugging_face, initialize, materialize
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from tests.checkpoint import ranks
from tests.distributed.cases import make_trainer, tiny_llama
from tests.losses import as_batch

pytestmark = pytest.mark.slow

STEPS = 3


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))


def resharded(model: nn.Module, /, *, parallel_dims: Any) -> nn.Module:
    """Someone's own sharding, which frees the outermost parameters after the forward pass."""
    if not parallel_dims.dp_enabled:
        return model
    mesh = parallel_dims.get_mesh("fsdp")
    for block in model.model.layers:
        fully_shard(block, mesh=mesh).set_gradient_divide_factor(1.0)
    fully_shard(model, mesh=mesh, reshard_after_forward=True).set_gradient_divide_factor(1.0)
    return model


def with_own_unit(model: nn.Module, /, *, parallel_dims: Any) -> nn.Module:
    """The output projection is gathered and freed by itself, for every chunk."""
    if not parallel_dims.dp_enabled:
        return model
    mesh = parallel_dims.get_mesh("fsdp")
    for block in (model.lm_head, *model.model.layers):
        fully_shard(block, mesh=mesh).set_gradient_divide_factor(1.0)
    fully_shard(model, mesh=mesh).set_gradient_divide_factor(1.0)
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie": False},
    "tied, resharded": {"parallelize_fn": resharded},
    "untied, resharded": {"tie": False, "parallelize_fn": resharded},
    "untied, own unit": {"tie": False, "parallelize_fn": with_own_unit},
    "untied, accumulated": {"tie": False, "accumulation": 4},
    "tied, recomputed": {"parallelize_fn": partial(shard, activation_checkpointing=full)},
    "lora": {"tie": False, "adapter": partial(lora, targets=["q_proj", "lm_head"])},
    "lora, tied": {"adapter": partial(lora, targets=["q_proj", "v_proj"]), "accumulation": 2},
    "bfloat16": {
        "tie": False,
        "parallelize_fn": partial(shard, param_dtype="bfloat16", reduce_dtype="float32"),
    },
}


def losses(
    chunked: bool, *, tie: bool = True, adapter: Any = None, **options: Any
) -> list[tuple[float, float]]:
    """The loss and gradient norm of every step."""
    model = tiny_llama(tie=tie)
    model = adapter(model) if adapter else model
    loss_fn: Any = CrossEntropyLoss(output="logits")
    if chunked:
        model, loss_fn = skip_lm_head(model), LinearCrossEntropyLoss(chunk_tokens=50)
    trainer, recorder = make_trainer(
        None, max_steps=STEPS, model=model, loss_fn=loss_fn, optimizer_name="SGD", **options
    )
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in recorder.rows if "loss" in row]


def train() -> dict[tuple[str, bool], Any]:
    return {
        (name, chunked): losses(chunked, **options)
        for name, options in VARIANTS.items()
        for chunked in (False, True)
    }


@pytest.fixture(scope="module")
def runs():
    return {n: ranks.run(train, n, timeout=400)[0] for n in (1, 2)}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_train_as_whole_logits_do(runs, name, n):
    whole, chunked = runs[n][name, False], runs[n][name, True]
    assert len(whole) == STEPS
    # In bfloat16 the gradients of chunks are rounded before they are summed.
    tolerance = 1e-3 if name == "bfloat16" else 3e-6
    for expected, found in zip(whole, chunked, strict=True):
        assert found == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_give_the_losses_of_one(runs, name):
    tolerance = 1e-3 if name == "bfloat16" else 3e-6
    for expected, found in zip(runs[1][name, True], runs[2][name, True], strict=True):
        assert found == pytest.approx(expected, abs=tolerance)


def one_rank_without_labels() -> tuple[float, float]:
    runtime = Runtime(seed=0)
    model = shard(skip_lm_head(tiny_llama(tie=False)), parallel_dims=runtime.parallel_dims)
    sum_gradients_on_gloo(model)
    materialize(model, runtime.device)
    initialize(model, device=runtime.device, init=hugging_face)
    ids = torch.arange(20).reshape(2, 10)
    labels = torch.full_like(ids, -100 if dist.get_rank() else 5)
    loss, _ = LinearCrossEntropyLoss(chunk_tokens=7)(
        model(ids), as_batch(labels), torch.tensor(20.0)
    )
    loss.backward()
    norms = [p.grad.full_tensor().norm() for p in model.parameters()]  # type: ignore[union-attr]
    return float(loss.detach()), float(torch.stack(norms).norm())


def test_a_rank_without_labels_does_not_hang_the_others():
    (loss, norm), (nothing, norm_there) = ranks.run(one_rank_without_labels, 2)
    assert nothing == 0 < loss
    assert norm == norm_there > 0
