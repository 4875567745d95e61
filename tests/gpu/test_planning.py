"""The peak of a plan against the peak that a GPU measures."""

from __future__ import annotations

import dataclasses
import gc
from functools import partial

import pytest
import torch

from ditty_di.batch import Batch
from ditty_di.data.loader import Loader
from ditty_di.data.tokens import TokenDataset
from ditty_di.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.data_parallel import shard
from ditty_di.planning import Recipe, plan
from ditty_di.runtime import Runtime
from tests.distributed.cases import make_trainer, tokens
from tests.planning.cases import DEVICE, lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = partial(shard, param_dtype="bfloat16", reduce_dtype="float32")
GPU = dataclasses.replace(DEVICE, grouped_attention=("bfloat16", "float16"))
ROWS, SEQ = 4, 1024


def model(adapter=None):
    """A model of 0.2 billion parameters, whose step takes gigabytes: workspaces count little."""
    from tests.models.tiny import llama

    size = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    config = llama(**size, **heads, num_hidden_layers=12, max_position_embeddings=SEQ)
    return from_config(config, adapter=adapter)


@pytest.mark.parametrize(
    "slots",
    [
        {"parallelize_fn": shard},
        {"parallelize_fn": BF16},
        {"parallelize_fn": partial(BF16, activation_checkpointing=full)},
        {"parallelize_fn": BF16, "loss_fn": LinearCrossEntropyLoss(chunk_tokens=1024)},
        {"parallelize_fn": BF16, "adapter": lora},
        {"parallelize_fn": BF16, "accumulation": 2},
    ],
    ids=["float32", "bf16", "recomputed", "chunked", "LoRA", "accumulated"],
)
def test_the_peak_is_within_a_tenth_of_what_the_gpu_measures(slots):
    slots = dict(slots)
    adapter, accumulation = slots.pop("adapter", None), slots.pop("accumulation", 1)
    slots.setdefault("loss_fn", CrossEntropyLoss(output="logits"))
    slots["optimizer"] = partial(torch.optim.AdamW, lr=1e-4)
    ids = torch.zeros(ROWS, SEQ, dtype=torch.int64)
    made = plan(
        Recipe(
            model=model(adapter),
            runtime=Runtime,
            batch=Batch({"input": ids}, ids),
            global_batch_size=ROWS * accumulation,
            **slots,
        ),
        world_size=1,
        device=GPU,
    )
    gc.collect()
    before = torch.cuda.memory_allocated()  # of tests before this one
    trainer, _ = make_trainer(
        None,
        model=model(adapter),
        weights=None,
        rows=ROWS * accumulation,
        accumulation=accumulation,
        dataloader=partial(Loader, TokenDataset(tokens(), SEQ), micro_batch_size=ROWS),
        lr_scheduler=None,
        max_steps=3,
        **slots,
    )
    try:
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        real = torch.cuda.max_memory_allocated() - before
    finally:
        trainer.close()
        trainer.runtime.close()
    assert made.worst.bytes == pytest.approx(real, rel=0.1)
