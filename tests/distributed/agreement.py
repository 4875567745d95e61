"""Two ranks that see different things and must do the same; run by `test_agreement`."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditty_di.checkpoint import Checkpointer
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss
from ditty_di.optim.schedules import constant
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from tests.distributed.cases import Recorder


class Batches:
    """`count` micro-batches of this rank; the one numbered `bad` holds NaN."""

    batch_size = 4

    def __init__(self, count: int, *, dp_rank: int, dp_world_size: int, bad: int | None = None):
        self.count, self.bad = count, bad
        self.dp_rank, self.dp_world_size, self.position = dp_rank, dp_world_size, 0

    def __iter__(self) -> Any:
        while self.position < self.count:
            x = torch.full((4, 2), 0.1 * self.position + self.dp_rank)
            if self.position == self.bad:
                x[0] = torch.nan
            self.position += 1
            yield {"input": x}, torch.tensor([0, 1, 2, -100])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def trainer(batches: Any, **slots: Any) -> Trainer:
    runtime = Runtime(seed=0)
    # Each rank makes other values: the trainer makes them equal before sharding.
    torch.manual_seed(runtime.rank)
    options = {
        "model": nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 3)),
        "loss_fn": CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "lr_scheduler": partial(constant, max_steps=100),
        "parallelize_fn": shard,
        "dataloader": batches,
        "max_steps": 6,
    }
    return Trainer(runtime=runtime, **{**options, **slots})


def fused(named: Any, *, on_device: bool) -> torch.optim.Optimizer:
    """AdamW, which says whether its update can be skipped on the device."""
    optimizer = torch.optim.AdamW(named, lr=0.1, fused=True)
    optimizer._step_supports_amp_scaling = on_device
    return optimizer


def whole(trainer: Trainer) -> list[float]:
    parameters = trainer.model_parts[0].parameters()
    return torch.cat([p.full_tensor().detach().flatten() for p in parameters]).tolist()


def by_rank(runtime: Runtime, value: Any) -> list[Any]:
    gathered: list[Any] = [None] * runtime.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def agreement(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    runtime = Runtime(seed=0)
    mine = runtime.rank

    start = trainer(partial(Batches, 9))
    out["start"] = by_rank(runtime, whole(start))

    nan = trainer(partial(Batches, 9, bad=2 if mine else None))
    try:
        nan.train()
        message = ""
    except FloatingPointError as error:
        message = str(error)
    clean = trainer(partial(Batches, 9), max_steps=2)
    clean.train()
    out["nan"] = by_rank(runtime, message)
    out["nan_weights"] = by_rank(runtime, whole(nan) == whole(clean))

    out["skipped"] = []
    for on_device in (True, False):
        skips = trainer(
            partial(Batches, 9, bad=2 if mine else None),
            optimizer=partial(fused, on_device=on_device),
            max_skipped_steps=2,
        )
        result = skips.train()
        found = result["skipped_steps"], result["objective"], whole(skips)
        out["skipped"].append(by_rank(runtime, found))

    checkpoints = partial(Checkpointer, str(folder / "uneven"), save_interval=100)
    uneven = trainer(partial(Batches, 5 - 2 * mine), checkpointer=checkpoints)
    out["uneven"] = by_rank(runtime, uneven.train())
    uneven.close()
    out["uneven_saved"] = sorted(p.name for p in (folder / "uneven").iterdir())

    accumulated = trainer(partial(Batches, 5 - 2 * mine), global_batch_size=16)
    out["uneven_accumulated"] = by_rank(runtime, accumulated.train())

    class Kill(Recorder):
        def write(self, step: int, values: dict[str, float]) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    checkpoints = partial(Checkpointer, str(folder / "killed"), save_interval=100)
    # Only rank 0 has writers, so only rank 0 is signalled.
    killed = trainer(
        partial(Batches, 9),
        logger=MetricsProcessor([Kill()], log_interval=1),
        checkpointer=checkpoints,
    )
    out["killed"] = by_rank(runtime, killed.train())
    killed.close()
    return out
