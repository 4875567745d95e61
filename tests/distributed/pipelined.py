"""A model split over two ranks; run by `test_pipeline`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import pipelining

import ditty_di.compat  # noqa: F401
from ditty_di.checkpoint import Checkpointer
from ditty_di.data.loader import Loader
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss
from ditty_di.optim.schedules import constant
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from tests.distributed.cases import VOCAB, Ragged, Recorder


class Staged(nn.Module):
    """An embedding, two layers and a head; a stage has some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Embedding(VOCAB, 32), nn.Linear(32, 32), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, VOCAB))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def split(
    model: Any,
    /,
    *,
    parallel_dims: Any,
    device: Any,
    loss_fn: Any,
    parallelize_fn: Any,
    n_microbatches: int,
) -> Any:
    mesh = parallel_dims.get_mesh("pp")
    rank = mesh.get_local_rank()
    if rank == 0:
        model.second = nn.Identity()
    else:
        model.first = nn.Identity()
    stage = pipelining.PipelineStage(model, rank, 2, device, group=mesh.get_group())
    # The loss is divided by the window's count already: no second division.
    schedule = pipelining.Schedule1F1B(stage, n_microbatches, loss_fn=loss_fn, scale_grads=False)
    return schedule, [model], rank == 0, rank == 1


def pipelined(folder: Path, steps: int = 6) -> dict[str, Any]:
    """Losses and gradient norms of a training on one rank, or on a pipeline of two."""
    import os

    pipeline = os.environ["WORLD_SIZE"] == "2"
    runtime = Runtime(seed=1, dp_shard=1, pp=2 if pipeline else 1)
    torch.manual_seed(1)
    recorder = Recorder()
    trainer = Trainer(
        runtime=runtime,
        model=Staged(),
        loss_fn=CrossEntropyLoss(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=partial(constant, max_steps=steps),
        dataloader=partial(Loader, Ragged(), micro_batch_size=4, seed=1),
        pipeline_fn=partial(split, n_microbatches=4) if pipeline else None,
        checkpointer=partial(
            Checkpointer, str(folder / "checkpoints"), save_interval=3, keep_latest_k=None
        ),
        logger=MetricsProcessor([recorder], log_interval=1),
        global_batch_size=16,
        max_grad_norm=0.1,
        max_steps=steps,
    )
    trainer.train()
    trainer.close()
    return {name: [row[name] for row in recorder.rows] for name in ("loss", "grad_norm")}
