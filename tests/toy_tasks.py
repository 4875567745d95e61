"""Tasks that need no model: what the command line, the launchers and the worker are tested with."""

import os
import signal
import time
from pathlib import Path
from typing import Any


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def finish(value: float = 1.0, bad: Any = None) -> dict[str, Any]:
    """Finishes, with its value as objective; fails when the value is `bad`."""
    print(f"rank {rank()} says {value}")
    if value == bad:
        raise RuntimeError(f"{value} is a bad value")
    return {"step": 3, "objective": value, "tokens_per_second": 10.0, "far": float("inf")}


def look(run: str, prompt: str, value: float) -> dict[str, Any]:
    """A task over a run that exists."""
    print(f"run={Path(run).name} prompt={prompt} value={value}")
    return {}


def show(graph: Any, *, key: str) -> None:
    """A task that is given the graph."""
    print(f"{key} is {graph.build(key)}")


def out_of_memory() -> None:
    raise MemoryError("more than there is")


def die(on_rank: int = 0) -> dict[str, Any]:
    """One rank vanishes without a word; the others wait for it."""
    if rank() == on_rank:
        os._exit(3)
    time.sleep(600)
    return {}


def collective(fails_on: int) -> dict[str, Any]:
    """One rank raises while the others are in a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if rank() == fails_on:
        raise ValueError("this rank cannot go on")
    dist.barrier()
    return {}


def until_stopped(stop_file: str, ready: str) -> dict[str, Any]:
    """Steps until a signal came or the stop file is there, as a training loop does."""
    seen: list[int] = []
    if "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    Path(f"{ready}-{rank()}").touch()
    for step in range(600):
        if seen or Path(stop_file).exists():
            return {"status": "preempted", "step": step}
        time.sleep(0.05)
    return {"step": 600}


def never_stops(ready: str) -> dict[str, Any]:
    Path(f"{ready}-{rank()}").write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def hydra_on_rank() -> None:
    import sys

    print("hydra", "hydra" in sys.modules)


def fail_above(value: float, limit: float) -> dict[str, Any]:
    if value > limit:
        raise RuntimeError(f"{value} is more than {limit}")
    return {"objective": value}


def until_asked(ready: str) -> dict[str, Any]:
    """Handles stop signals as a training loop does, and takes a moment to save."""
    from ditty_di.launch.signals import StopSignals

    asked: list[signal.Signals] = []
    signals = StopSignals(asked.append)
    signals.install()
    Path(f"{ready}-{rank()}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not asked and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    signals.restore()
    time.sleep(0.6)  # to write down how it went
    return {"status": "preempted" if asked else "finished", "step": 7}


def forks(ready: str) -> dict[str, Any]:
    """A rank with a forked process, as a data loader has."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    Path(f"{ready}-{rank()}").write_text(f"{os.getpid()} {child}")
    time.sleep(600)
    return {}


def hang(on_rank: int, seconds: float) -> dict[str, Any]:
    """One rank does not come to the collective that the others wait in."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    dist.barrier()
    if rank() == on_rank:
        unreachable_disk()
    dist.all_reduce(torch.ones(1), group=group)
    return {}


def flaky(how: str, starts: str, times: int = 1, on_rank: int = 1) -> dict[str, Any]:
    """Fails at its first starts on one rank, in some way."""
    file = Path(f"{starts}-{rank()}")
    with file.open("a") as appended:
        appended.write(os.environ.get("WORLD_SIZE", "1"))
    fails = len(file.read_text()) <= times
    if fails and how == "hang":
        hang(on_rank, seconds=3)
    if fails and rank() == on_rank:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        error = OSError("shard 7 is unreadable")
        error.training_step = 3
        raise error
    return {"step": 3}


def grows(starts: str, to: int) -> dict[str, Any]:
    """Ends when asked to, as a training loop does, and by itself once there are `to` ranks."""
    with Path(f"{starts}-{rank()}").open("a") as file:
        file.write(os.environ["WORLD_SIZE"])
    if int(os.environ["WORLD_SIZE"]) == to:
        return {"step": 3}
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    deadline = time.monotonic() + 60
    while not asked and time.monotonic() < deadline:
        time.sleep(0.02)
    return {"status": "preempted" if asked else "finished", "step": 1}


def unreachable_disk() -> None:
    time.sleep(600)


class Shard:
    """Data that cannot be read."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def read(self) -> None:
        error = OSError("shard 7 is unreadable")
        if self.step is not None:
            error.training_step = self.step
        raise error


class Broken:
    """A component that no start can build."""

    def __init__(self, starts: str) -> None:
        with Path(f"{starts}-{rank()}").open("a") as file:
            file.write(os.environ.get("WORLD_SIZE", "1"))
        raise ValueError("rows=0: give at least one")


def read(shard: Shard) -> dict[str, Any]:
    shard.read()
    return {}


def sign() -> dict[str, Any]:
    """Leaves a file of this rank in the working folder."""
    Path(f"signed-by-{rank()}").touch()
    return {}


def stopped_once(marker: str, value: float) -> dict[str, Any]:
    """Is stopped at its first start, and finishes at the next."""
    if not Path(marker).exists():
        Path(marker).touch()
        return {"status": "preempted", "step": 1}
    return {"objective": value, "step": 2}
