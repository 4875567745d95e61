"""Two ranks that are measured: which is slow and where, norms by block, traces, spikes."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.config.function import Function
from torchtitan.tools.profiler import Profiler

from ditty_di.callbacks import BlockStatistics, Stragglers
from ditty_di.loggers import MetricsProcessor
from ditty_di.loggers.trace import write_summary
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from ditty_di.training.spikes import MedianMultiple
from tests.distributed.agreement import Batches, by_rank, trainer, whole
from tests.distributed.cases import Recorder, make_trainer

SLOW = 0.1  # seconds


class SlowBatches(Batches):
    """Loading takes longer on rank 1."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            time.sleep(SLOW * self.dp_rank)
            yield batch


class SlowBlock(nn.Linear):
    """The forward pass takes longer on rank 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.0 if torch.distributed.get_rank() else SLOW)
        return super().forward(x)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 8), SlowBlock(8, 8), nn.Linear(8, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Huge(Batches):
    """The fifth micro-batch of rank 1 is far out, and finite."""

    def __iter__(self) -> Any:
        for n, (inputs, labels) in enumerate(super().__iter__()):
            scale = 1e4 if n == 4 and self.dp_rank else 1.0
            yield {"input": inputs["input"] * scale}, labels


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def straggling(batches: Any, **slots: Any) -> dict[str, Any]:
    """What the metrics and the log say about a slow rank."""
    recorder, records = Recorder(), Records()
    logger = logging.getLogger("ditty_di.callbacks.stragglers")
    logger.addHandler(records)
    trainer(
        batches,
        logger=MetricsProcessor([recorder], log_interval=2),
        callbacks={"stragglers": Stragglers()},
        **slots,
    ).train()
    logger.removeHandler(records)
    return {"rows": recorder.rows, "said": records.said}


def statistics(**options: Any) -> list[dict[str, float]]:
    """The statistics by block of the second step of a tiny Llama."""
    made, recorder = make_trainer(
        None, max_steps=3, callbacks={"blocks": BlockStatistics(interval=2)}, **options
    )
    made.train()
    made.close()
    return [row for row in recorder.rows if any(name.startswith("blocks/") for name in row)]


def measured(folder: Path) -> dict[str, Any]:
    runtime = Runtime(seed=0)
    out: dict[str, Any] = {
        "data": by_rank(runtime, straggling(partial(SlowBatches, 9))),
        "forward": by_rank(runtime, straggling(partial(Batches, 9), model=Blocks())),
    }

    out["spikes"] = []
    for fused in (True, False):
        policy = MedianMultiple(loss=None, grad_norm=20.0, window=4, min_steps=2)
        made = trainer(
            partial(Huge, 9),
            optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=fused),
            spike_policy=policy,
            max_skipped_steps=1,
        )
        result = made.train()
        found = result["skipped_spikes"], result["skipped_steps"], whole(made)
        out["spikes"].append(by_rank(runtime, found))

    after = Function.Config(fn=write_summary)
    config = Profiler.Config(enable_profiling=True, profile_freq=5, trace_post_processor=after)
    out["blocks"] = {
        "fsdp": statistics(layout="fsdp"),
        "ddp": statistics(layout="ddp"),
        "tp": statistics(runtime=Runtime(seed=3, tp=2), parallelize_fn=parallelize),
    }
    made, _ = make_trainer(
        None,
        max_steps=5,
        parallelize_fn=shard,
        profiler=partial(Profiler, config, base_folder=str(folder)),
    )
    made.train()
    made.close()
    return out
