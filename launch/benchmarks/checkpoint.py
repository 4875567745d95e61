"""What a checkpoint costs: the stall of synchronous and asynchronous saves, beside `torch.save`.

A model of 100 million parameters with AdamW (1.2 GB of state in float32) trains on random rows. The
contenders take turns: `torch.save` of the same state, without and with fsync; a synchronous save;
an asynchronous one, whose `save` waits for the copy alone. What the steps take longer until it is
written is given as well (`slower_s`; it is noise where other programs are at work). A save of ours
is flushed to disk, and has the SHA-256 of all.

    launch/bench checkpoint --json checkpoint.json
    launch/bench checkpoint --rows 4096 --device cuda
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _here import environment
from torch import nn

from ditty_di.checkpoint import Checkpointer
from ditty_di.checkpoint.model_state import ModelState
from ditty_di.checkpoint.states import OptimizerState

INTERVAL = 100  # steps between checkpoints, over which a stall is spread


class Training:
    """Layers of 1024 x 1024, AdamW, and random rows."""

    def __init__(self, million: int, rows: int, device: str) -> None:
        layers = max(1, round(million * 1e6 / (1024 * 1025)))
        self.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers))).to(device)
        fused = device != "cpu"
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=1e-4, fused=fused)
        self.rows = torch.randn(rows, 1024, device=device)
        self.device = device
        self.step()
        values = [*self.model.state_dict().values()]
        values += [v for state in self.optimizer.state.values() for v in state.values()]
        self.bytes = sum(v.numel() * v.element_size() for v in values)

    def step(self) -> float:
        """Do an optimizer step; return its seconds."""
        start = time.perf_counter()
        self.model(self.rows).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.accelerator.synchronize()


class Contenders:
    """The ways to save: each returns the seconds that training waits, and those until the end."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.folder, self.number = training, folder, 0
        states: dict[str, Any] = {
            "model": ModelState([training.model]),
            "optimizer": OptimizerState(training.optimizer),
        }
        self.savers = {
            background: Checkpointer(
                folder / str(background),
                states=states,
                rank_states={},
                keep_latest_k=1,
                async_save=background,
            )
            for background in (False, True)
        }
        self.plain_step = self.slower = 0.0

    def all(self) -> dict[str, Callable[[], tuple[float, float]]]:
        """Return the contenders by name."""
        return {
            "torch.save": self.torch_save,
            "torch.save, flushed": lambda: self.torch_save(flush=True),
            "synchronous": self.synchronous,
            "asynchronous": self.asynchronous,
        }

    def torch_save(self, flush: bool = False) -> tuple[float, float]:
        """Write the state dicts to one file."""
        start = time.perf_counter()
        state = {
            "model": self.training.model.state_dict(),
            "optimizer": self.training.optimizer.state_dict(),
        }
        with (self.folder / "plain.pt").open("wb") as file:
            torch.save(state, file)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        taken = time.perf_counter() - start
        return taken, taken

    def synchronous(self) -> tuple[float, float]:
        """Save, and wait for it."""
        self.number += 1
        start = time.perf_counter()
        self.savers[False].save(self.number, force=True)
        taken = time.perf_counter() - start
        return taken, taken

    def asynchronous(self) -> tuple[float, float]:
        """Save, and train until it is written."""
        self.number += 1
        saver, steps = self.savers[True], []
        start = time.perf_counter()
        saver.save(self.number, force=True)
        copied = time.perf_counter() - start
        while saver._thread is not None and saver._thread.is_alive():
            steps.append(self.training.step())
        self.slower = sum(steps) - len(steps) * self.plain_step
        return copied, time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all rounds, and their medians."""
    training = Training(options.million, options.rows, options.device)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    rounds: dict[str, list[dict[str, float]]] = {}
    steps: list[float] = []
    try:
        contenders = Contenders(training, folder)
        for number in range(options.rounds + 1):
            own = [training.step() for _ in range(options.steps)]
            contenders.plain_step = statistics.median(own)
            steps += own
            for name, save in contenders.all().items():
                stall, whole = save()
                figures = {"stall_s": stall, "whole_s": whole}
                if name == "asynchronous":
                    figures["slower_s"] = contenders.slower
                if number:  # the first round warms up: pages, files, host memory
                    rounds.setdefault(name, []).append(figures)
        for saver in contenders.savers.values():
            saver.close()
    finally:
        shutil.rmtree(folder)
    step = statistics.median(steps)
    medians = {
        name: {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        for name, figures in rounds.items()
    }
    for figures in medians.values():
        figures["bytes_per_s"] = training.bytes / figures["whole_s"]
        figures["share_of_a_step_at_interval_100"] = figures["stall_s"] / INTERVAL / step
    return {"bytes": training.bytes, "step_s": step, "medians": medians, "rounds": rounds}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--million", type=int, default=100, help="parameters, in millions")
    parser.add_argument("--rows", type=int, default=64, help="rows of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps of a round without a save")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, beside the first")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--folder", help="where the checkpoints are written")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.disable()  # as the trainer does
    result = measure(options)
    print(f"{result['bytes'] / 1e9:.2f} GB, a step of {1e3 * result['step_s']:.0f} ms")
    for name, figures in result["medians"].items():
        print(
            f"{name:20} training waits {figures['stall_s']:7.3f} s "
            f"({100 * figures['share_of_a_step_at_interval_100']:5.2f} % of a step every "
            f"{INTERVAL}), whole after {figures['whole_s']:7.3f} s, "
            f"{figures['bytes_per_s'] / 1e9:.2f} GB/s"
            + (f", steps slower by {figures['slower_s']:.3f} s" if "slower_s" in figures else "")
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": environment(), **result}, file, indent=2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
