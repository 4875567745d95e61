"""Trainings that are planned, and run on real ranks to compare; run by `test_planning`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from ditty_di import adapters, quantization
from ditty_di.batch import Batch
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.optim import bitsandbytes, combined
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.stages import split
from ditty_di.planning import Device, Recipe, plan
from ditty_di.planning.meter import nbytes
from ditty_di.runtime import Runtime
from tests.distributed.cases import make_trainer, optimizer
from tests.parallelize.matrix import MODELS

DEVICE = Device(
    name="test",
    memory_gib=1.0,
    tflops={"float32": 1.0},
    memory_gbps=100.0,
    per_node=2,
    node_gbps=10.0,
    network_gbps=1.0,
    grouped_attention=("float32", "bfloat16"),
)
ROWS, SEQ, LAYERS = 4, 32, 5


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig

    return adapters.apply_adapter(model, config=LoraConfig(r=4, target_modules="all-linear"))


def llama(
    *, tie: bool = True, adapt: bool = False, packed: bool = False, **options: Any
) -> nn.Module:
    from tests.models.tiny import llama

    config = llama(
        vocab_size=66 if adapt else 64,  # 66 rows are not the same on four ranks
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    transforms = {
        "quantize": partial(quantization.nf4, block_size=16) if packed else None,
        "adapter": lora if adapt else None,
    }
    return from_config(config, **transforms, **options)


def muon(named: Any) -> Any:
    """Matrices of the blocks have one optimizer, and those of the second block another rate."""
    rules = [
        {"match": r"layers\.1\.", "optimizer": partial(torch.optim.SGD, momentum=0.9)},
        {"min_ndim": 2, "max_ndim": 2, "exclude": "embed", "optimizer": torch.optim.Muon},
        {"optimizer": torch.optim.AdamW},
    ]
    return combined(named, rules=rules, lr=1e-3)


BF16 = partial(shard, param_dtype="bfloat16", reduce_dtype="float32")
COPIES = {"dp_replicate": -1, "dp_shard": 1}
experts = partial(MODELS["Qwen3-MoE"].build, {}, None)
#: name -> (makes the model, optimizer, parallelize_fn, degrees of the runtime on several ranks)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, int]]] = {
    "AdamW, tied": (llama, optimizer("AdamW"), shard, {}),
    "SGD, bf16": (partial(llama, tie=False), optimizer("SGD"), BF16, {}),
    "8 bits": (llama, optimizer("AdamW8bit"), shard, {}),
    "8 bits, bitsandbytes": (llama, bitsandbytes.adamw, shard, {}),
    "fused": (llama, partial(torch.optim.AdamW, fused=True), shard, COPIES),
    "Muon": (llama, muon, shard, {}),
    "LoRA": (partial(llama, adapt=True), optimizer("AdamW"), BF16, {}),
    "QLoRA": (partial(llama, adapt=True, packed=True), optimizer("AdamW"), shard, {}),
    "hsdp": (llama, optimizer("AdamW"), shard, {"dp_replicate": 2}),
    "tp": (llama, optimizer("AdamW"), parallelize, {"tp": 2}),
    "cp": (llama, optimizer("AdamW"), parallelize, {"cp": 2}),
    "ep": (experts, optimizer("AdamW"), parallelize, {"ep": 2}),
    "pp": (llama, optimizer("AdamW"), parallelize, {"pp": 2}),
    "QLoRA, tp": (
        partial(llama, adapt=True, packed=True),
        optimizer("AdamW"),
        parallelize,
        {"tp": 2},
    ),
    "ep, tp": (experts, optimizer("AdamW"), parallelize, {"ep": 2, "tp": 2}),
    "cp, tp": (llama, optimizer("AdamW"), parallelize, {"cp": 2, "tp": 2}),
}


def batch() -> Batch:
    ids = torch.zeros(ROWS, SEQ, dtype=torch.int64)
    return Batch({"input": ids}, ids)


def recipe(name: str, ranks: int) -> Recipe:
    model, factory, parallelize_fn, degrees = CASES[name]
    return Recipe(
        model=model(),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=factory,
        runtime=partial(Runtime, **(degrees if ranks > 1 else {})),
        batch=batch(),
        parallelize_fn=parallelize_fn,
        pipeline_fn=split,
        global_batch_size=2 * ROWS * ranks // degrees["pp"] if "pp" in degrees else None,
    )


def planned(folder: Path, cases: list[str]) -> dict[str, Any]:
    """Bytes on every rank by case: those planned, and those of a training of one step."""
    ranks, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK"))
    plans = {}
    for name in cases:  # all of them first: a plan is made without a process group
        of_stage = ranks // CASES[name][3].get("pp", 1)
        made = plan(recipe(name, ranks), world_size=ranks, rank=rank % of_stage, device=DEVICE)
        plans[name] = made.positions[rank // of_stage]
    dist.init_process_group("gloo")
    found = {}
    for name in cases:
        model, factory, parallelize_fn, degrees = CASES[name]
        trainer, _ = make_trainer(
            None,
            model=model(),
            weights=None,
            optimizer=factory,
            lr_scheduler=None,
            parallelize_fn=parallelize_fn,
            pipeline_fn=split,
            accumulation=2 if "pp" in degrees else 1,
            runtime=Runtime(seed=3, **(degrees if ranks > 1 else {})),
            max_steps=1,
        )
        with torch.compiler.set_stance("force_eager"):  # torchao's step is slow to compile
            trainer.train()
        module, states = trainer.model_parts[0], trainer.optimizer.state
        real = {
            "parameters": sum(map(nbytes, module.parameters())),
            "buffers": sum(map(nbytes, {id(b): b for b in module.buffers()}.values())),
            "gradients": sum(nbytes(p.grad) for p in module.parameters() if p.grad is not None),
            "optimizer": sum(
                nbytes(x) for own in states.values() for x in own.values() if torch.is_tensor(x)
            ),
        }
        exact = plans[name].exact
        everywhere: list[Any] = [None] * ranks
        dist.all_gather_object(everywhere, {k: (exact[k], size) for k, size in real.items()})
        found[name] = everywhere
        trainer.close()
        trainer.runtime.close()
    return found


def peaks(folder: Path, name: str) -> list[float]:
    """Bytes at the peak of forward and backward: those planned, and by torch's own tracker."""
    ranks, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK"))
    made = plan(recipe(name, ranks), world_size=ranks, rank=rank, device=DEVICE).positions[0]
    model, factory, parallelize_fn, _ = CASES[name]
    trainer, _ = make_trainer(
        None, model=model(), weights=None, optimizer=factory, parallelize_fn=parallelize_fn
    )
    given = batch()
    tracker = FSDPMemTracker(trainer.model_parts[0])
    tracker.track_inputs((given.inputs["input"],))
    with tracker:
        trainer.optimizer_step.forward_backward([given], trainer.loss_fn.num_valid(given).float())
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return [made.bytes - made.peak["optimizer"], theirs]
