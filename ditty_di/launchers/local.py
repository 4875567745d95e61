"""Ranks on this machine: one in this process, or several as child processes of this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ditty_di import worker
from ditty_di.launchers.process import Children, Start
from ditty_di.memory_kills import how_killed, kills_so_far
from ditty_di.rundir import RunDirectory
from ditty_di.stop_signals import SIGNALS, announce


class Local:
    """Called with a run directory; returns the exit code of its ranks.

    Several ranks get the environment of `torchrun` (`RANK`, `WORLD_SIZE`, `MASTER_PORT`, ...). They
    are child processes without an agent between: this process sees which rank failed first, and all
    of them end when it does.

    Args:
        nproc: number of ranks; None takes one for each GPU, or one without a GPU.
        grace_seconds: how long ranks that were asked to stop may take to save, before they are
            killed. Matters with several ranks; a single one runs in this process.

    A SIGTERM, SIGHUP or SIGINT makes the file `stop` in the run directory: all ranks agree on it at
    a step's end, save, and leave with status `preempted`. A second Ctrl-C kills them.

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
        return worker.main(run_dir) if nproc == 1 else self._ranks(RunDirectory(run_dir), nproc)

    def _ranks(self, run: RunDirectory, nproc: int) -> int:
        def ask(processes: list[subprocess.Popen], number: signal.Signals) -> None:
            run.stop.touch()
            announce(number)

        started, kills = time.time(), kills_so_far()
        children = Children(ask, self.grace_seconds)
        with _reserved_port() as port, ExitStack() as logs:
            starts = [_rank(run, rank, nproc, port, logs) for rank in range(nproc)]
            codes = children.run(starts)
        if not any(codes):
            return 0
        failure = self._failure(run, children, codes, kills)
        if failure is None:  # rank 0 has written a result, and no process failed
            return 1
        worker.say(run, {"seconds": time.time() - started} | failure)
        return worker.exit_code(failure)

    def _failure(
        self, run: RunDirectory, children: Children, codes: list[int], kills: int | None
    ) -> dict[str, Any] | None:
        """The failure that the others followed from; None when no rank failed as a process."""
        if children.quit:
            return worker.interrupted(run, "quit without saving")
        if children.overdue:
            assert children.signalled is not None
            message = (
                f"killed: the ranks did not stop when asked ({children.signalled.name}), within "
                f"launcher.grace_seconds={self.grace_seconds:g}"
            )
            return {"status": "failed", "error": message + worker.goes_on(run)}
        errors = run.errors()
        for error in errors:
            if error.get("hanging"):
                return error
        spoke = {error["rank"] for error in errors}
        failed = [rank for rank in children.ended if codes[rank]]
        if failed and failed[0] not in spoke:
            return _death(run, failed[0], codes[failed[0]], kills)
        if errors:
            return errors[0]
        if run.read_result() is not None:
            return None
        return {"status": "failed", "error": f"the ranks ended with exit codes {codes}"}


def _rank(run: RunDirectory, rank: int, nproc: int, port: int, logs: ExitStack) -> Start:
    """One rank: rank 0 has the console, the others' output goes to their log files."""
    threads = str(max((os.cpu_count() or 1) // nproc, 1))
    env = {"OMP_NUM_THREADS": threads} | dict(os.environ)
    env |= {
        worker.LAUNCHED: "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    popen: dict[str, Any] = {"stdin": subprocess.DEVNULL}
    if rank > 0:
        log = logs.enter_context((run.logs / f"rank-{rank}.log").open("ab"))
        popen |= {"stdout": log, "stderr": log}
    return Start([sys.executable, "-m", "ditty_di.worker", str(run.path)], env, popen)


def _death(run: RunDirectory, rank: int, code: int, kills: int | None) -> dict[str, Any]:
    """A rank that ended without a message."""
    if -code in SIGNALS:
        name = signal.Signals(-code).name
        return worker.interrupted(run, f"{name} reached rank {rank} before it could save") | {
            "rank": rank
        }
    if code == -signal.SIGKILL:
        how = f"was killed ({how_killed(kills)})"
    elif code < 0:
        how = f"died of signal {-code} ({signal.strsignal(-code)}); see {run}/logs/rank-{rank}.log"
    else:
        how = f"ended with exit code {code} and no message"
    return {"status": "failed", "error": f"rank {rank} {how}", "rank": rank}


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port for rank 0's store. On Linux it stays reserved: bound, without listening,
    which keeps others from getting it and lets a process that asks for just this port have it."""
    with ExitStack() as sockets:
        v4 = sockets.enter_context(socket.socket(socket.AF_INET))
        v4.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        v4.bind(("", 0))
        port = v4.getsockname()[1]
        if sys.platform == "linux":
            if socket.has_ipv6:
                try:
                    v6 = sockets.enter_context(socket.socket(socket.AF_INET6))
                    v6.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    v6.bind(("", port))
                except OSError:  # no IPv6 here
                    pass
        else:
            v4.close()
        yield port


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


def visible_gpus() -> list[str]:
    """Return the GPUs that the ranks may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(gpu_count())]
