"""Ranks on this machine: one in this process, or several through `torch.distributed.run`."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ditty_di import worker
from ditty_di.launchers.process import Child
from ditty_di.rundir import RunDirectory


class Local:
    """Called with a run directory; returns the exit code of its ranks.

    Args:
        nproc: number of ranks; None takes one for each GPU, or one without a GPU.
        grace_seconds: how long ranks that were asked to stop may take to save, before they are
            killed. Matters with several ranks; a single one runs in this process.

    A SIGTERM or SIGINT makes the file `stop` in the run directory: all ranks agree on it at a
    step's end, save, and leave with status `preempted`. A second signal kills them.

    Raises:
        ValueError: `nproc` is less than one.
    """

    @staticmethod
    def validate(*, nproc: int | None = None) -> None:
        if nproc is not None and nproc < 1:
            raise ValueError(f"launcher.nproc={nproc}: give the number of ranks (null: one a GPU)")

    def __init__(self, nproc: int | None = None, grace_seconds: float = 300.0) -> None:
        self.validate(nproc=nproc)
        self.nproc = nproc
        self.grace_seconds = grace_seconds

    def __call__(self, run_dir: str | Path) -> int:
        nproc = self.nproc or max(gpu_count(), 1)
        return worker.main(run_dir) if nproc == 1 else self._elastic(RunDirectory(run_dir), nproc)

    def _elastic(self, run: RunDirectory, nproc: int) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(nproc), "-m", "ditty_di.worker", str(run.path)]
        # torchrun would set this to 1 for want of knowing better.
        threads = str(max((os.cpu_count() or 1) // nproc, 1))
        defaults = {"OMP_NUM_THREADS": threads, worker.LAUNCHED: "1"}
        child = Child(ask=lambda process: run.stop.touch(), grace_seconds=self.grace_seconds)
        started = time.time()
        with (run.logs / "launcher.log").open("a+", encoding="utf-8", errors="replace") as log:
            begin = log.seek(0, os.SEEK_END)
            # What torchrun has to say goes to a file. Rank 0 finds the console's standard error on
            # file descriptor 0, the only one left that is handed down, and puts it in its place.
            code = child.run(command, stdin=2, stderr=log, env=defaults | dict(os.environ))
            log.seek(begin)
            said = log.read()
        if code == 0:
            return 0
        if child.killed:
            failure = {"status": "failed", "error": "killed: the ranks did not stop when asked"}
        else:
            failure = _first_failure(run, said) or {
                "status": "failed",
                "error": f"torchrun ended with exit code {code}; see {run}/logs/launcher.log",
            }
        worker.say(run, {"seconds": time.time() - started} | failure)
        return 1


def _first_failure(run: RunDirectory, launcher_log: str) -> dict[str, Any] | None:
    """Of several ranks' failures, the one that the others followed from."""
    errors = run.errors()
    spoke = {error["rank"] for error in errors}
    for rank, code in _exit_codes(launcher_log).items():
        # A rank that died without a word was the cause, unless torchrun itself ended it.
        if rank not in spoke and code not in (0, -signal.SIGTERM):
            return {"status": "failed", "error": f"rank {rank} {_death(code)}", "rank": rank}
    return errors[0] if errors else None


def _exit_codes(launcher_log: str) -> dict[int, int]:
    """rank -> exit code, from the summary that torchrun writes about a failure."""
    entry = re.compile(r"^\s*rank\s*:\s*(\d+).*?^\s*exitcode\s*:\s*(-?\d+)", re.M | re.S)
    return {int(rank): int(code) for rank, code in entry.findall(launcher_log)}


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL: did the machine run out of memory?)"
    if code < 0:
        return f"died of signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code} and no message"


def gpu_count() -> int:
    """How many GPUs the ranks may use. Imports torch only where the machine seems to have any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return 0
    drivers = ("/proc/driver/nvidia/gpus", "/dev/dxg", "/dev/kfd")
    if sys.platform == "linux" and not any(map(os.path.exists, drivers)):
        return 0
    import torch

    return torch.cuda.device_count()
