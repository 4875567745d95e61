"""Ranks on this machine: one in this process, or several as child processes of this one.

After a failure they may be started again, from the last checkpoint.

The ranks are started by `Children` and not by torch's `elastic_launch`, which was tried against
the tests of this folder (torch 2.13). It imports torch in the parent, answers SIGTERM and Ctrl-C
by ending the ranks within 30 s instead of letting them save, does not end ranks whose launcher was
killed (SIGKILL), and logs several lines of its own where one message names the failed rank.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditty_di.config.early import validated
from ditty_di.console import LAUNCHED
from ditty_di.launch import worker
from ditty_di.launch.failure import Restarts, how_killed, oom_kills, report
from ditty_di.launch.processes import Children
from ditty_di.launch.rundir import RunDirectory
from ditty_di.launch.signals import SIGNALS, announce


@dataclass
class Group:
    """The ranks that this machine starts, among those of all machines.

    Args:
        nproc: number of ranks on this machine.
        world_size: number of all ranks.
        address: name and port of the store of rank 0.
        first: the first rank on this machine.
        node: number of this machine, of `nodes`.
        nodes: number of machines.
        env: further environment variables of the ranks.
        watch: called while they run; see `ditty_di.launch.processes.Children.run`.
    """

    nproc: int
    world_size: int
    address: tuple[str, int]
    first: int = 0
    node: int = 0
    nodes: int = 1
    env: dict[str, str] = field(default_factory=dict)
    watch: Callable[[], float | None] | None = None


@validated
@dataclass(eq=False)
class Local:
    """Run the ranks of a run directory on this machine.

    Several ranks get the environment of `torchrun` (`RANK`, `WORLD_SIZE`, `MASTER_PORT`, ...) and
    are direct child processes: this process sees which rank failed first, and when one fails all
    of them end.

    A SIGTERM, SIGHUP or SIGINT creates the file `stop` in the run directory: all ranks agree on it
    at the end of a step, save, and exit with status `preempted`. A second Ctrl-C kills them.

    Args:
        nproc: number of ranks; None means one for each GPU, or one without a GPU.
        grace_seconds: time in seconds that ranks may take to save after a stop signal, before they
            are killed. Not used where a single one runs in this process.
        max_restarts: how often all ranks are started again from the last checkpoint after one has
            failed. Not after a stop signal, nor where the same would happen again.
        dry_run: print what would be started, and start nothing.

    Raises:
        ValueError: `nproc` is less than one, or another argument negative.
    """

    nproc: int | None = None
    grace_seconds: float = 300.0
    max_restarts: int = 0
    dry_run: bool = False

    @staticmethod
    def validate(
        *, nproc: int | None = None, grace_seconds: float = 300.0, max_restarts: int = 0
    ) -> None:
        """Check the arguments without starting anything; see the class.

        Args:
            nproc: number of ranks.
            grace_seconds: in seconds.
            max_restarts: number of restarts.
        """
        if nproc is not None and nproc < 1:
            raise ValueError(f"launcher.nproc={nproc}: give the number of ranks (null: one a GPU)")
        if not grace_seconds >= 0:
            raise ValueError(f"launcher.grace_seconds={grace_seconds} must not be negative")
        if max_restarts < 0:
            raise ValueError(f"launcher.max_restarts={max_restarts} must not be negative")

    def __post_init__(self) -> None:
        self.restarts = Restarts(self.max_restarts)

    def preview(self, run: RunDirectory, config_dir: Path) -> int:
        """Print what would be started; return the exit code 0.

        Args:
            run: the run directory that a start would make.
            config_dir: folder with the configuration that the ranks would build.
        """
        print(
            f"on this machine, in {run}, restarting at most {self.restarts.allowed} times:\n"
            f"  {self._plan_of_ranks()}"
        )
        return 0

    def _plan_of_ranks(self) -> str:
        ranks = self.ranks_here()
        return (
            f"start {ranks} rank{'s' * (ranks > 1)}: {sys.executable} -m ditty_di.launch RUN, "
            "with RANK, WORLD_SIZE, MASTER_ADDR, ..."
        )

    def __call__(self, run_dir: str | Path) -> int:
        """Run the ranks and return the exit code of the run.

        Args:
            run_dir: a prepared run directory.
        """
        if self.ranks_here() == 1 and not self.restarts.allowed:
            return worker.main(run_dir)
        return self.supervise(RunDirectory(run_dir))

    def ranks_here(self) -> int:
        """Return the number of ranks on this machine."""
        return self.nproc or max(gpu_count(), 1)

    def supervise(self, run: RunDirectory) -> int:
        """Run ranks as children of this process, again after failures; return the exit code.

        Args:
            run: a prepared run directory.
        """

        def ask(number: signal.Signals) -> None:
            run.stop.touch()
            announce(number)

        started, kills = time.time(), oom_kills()
        children = Children(ask, self.grace_seconds)
        with children.signals:
            while True:
                with self.group(run, children) as group, ExitStack() as logs:
                    commands = [_command(run, group, n, logs) for n in range(group.nproc)]
                    codes = children.run(commands, group.watch)
                    failure = self._failure(run, children, group, codes, kills)
                    failure, again = self.agree(run, group, failure)
                if again:
                    continue
                if failure is None or children.signals.first is not None:
                    break
                if not self.restarts.again(run, failure):
                    break
                run.forget_end()
        more = {"restarts": self.restarts.count} if self.restarts.allowed else {}
        if failure is not None:
            return report(run, {"seconds": time.time() - started} | failure | more)
        if more and group.node == 0 and (result := run.read_result()):
            run.write_result(result | more | {"seconds": time.time() - started})
        return int(any(codes))  # 1 if rank 0 has written a result that is not good

    @contextmanager
    def group(self, run: RunDirectory, children: Children) -> Iterator[Group]:
        """Yield which ranks run within the context.

        Args:
            run: the run directory.
            children: what runs the ranks.
        """
        nproc = self.ranks_here()
        with reserved_port() as port:
            yield Group(nproc, nproc, ("localhost", port))

    def agree(
        self, run: RunDirectory, group: Group, failure: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, bool]:
        """Return the failure of all machines, and whether to start again without one.

        Args:
            run: the run directory.
            group: what this machine has started.
            failure: the failure on this machine.
        """
        return failure, False

    def _failure(
        self,
        run: RunDirectory,
        children: Children,
        group: Group,
        codes: list[int],
        kills: int | None,
    ) -> dict[str, Any] | None:
        """Return the failure that caused the others; None when no rank failed as a process."""
        if not any(codes):
            return None
        if children.quit:
            return run.interrupted("quit without saving")
        if children.overdue:
            assert children.signals.first is not None
            message = (
                f"killed: the ranks did not stop when asked ({children.signals.first.name}), "
                f"within launcher.grace_seconds={self.grace_seconds:g}"
            )
            return {"status": "failed", "error": message + run.resume_point()}
        errors = run.errors()
        for error in errors:
            if error.get("hanging"):
                return error
        failed = [index for index in children.ended if codes[index]]
        if failed and group.first + failed[0] not in {error["rank"] for error in errors}:
            return _unreported(run, group.first + failed[0], codes[failed[0]], kills)
        if errors:
            return errors[0]
        if run.read_result() is not None:
            return None
        return {"status": "failed", "error": f"the ranks ended with exit codes {codes}"}


def _command(run: RunDirectory, group: Group, index: int, logs: ExitStack) -> dict[str, Any]:
    """Return the `Popen` arguments of a rank: rank 0 has the console, others their log file."""
    rank, (host, port) = group.first + index, group.address
    threads = str(max((os.cpu_count() or 1) // group.nproc, 1))
    env = {"OMP_NUM_THREADS": threads} | group.env | dict(os.environ)
    env |= {
        LAUNCHED: "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(group.world_size),
        "LOCAL_WORLD_SIZE": str(group.nproc),
        "GROUP_RANK": str(group.node),
        "GROUP_WORLD_SIZE": str(group.nodes),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
    log = logs.enter_context((run.logs / f"rank-{rank}.log").open("ab")) if rank else None
    return {
        "args": [sys.executable, "-m", "ditty_di.launch", str(run.path)],
        "env": env,
        "stdin": subprocess.DEVNULL,
        "stdout": log,
        "stderr": log,
    }


def _unreported(run: RunDirectory, rank: int, code: int, kills: int | None) -> dict[str, Any]:
    """Return the failure of a rank that ended without reporting one."""
    if -code in SIGNALS:
        name = signal.Signals(-code).name
        how = f"{name} reached rank {rank} before it could save"
        return run.interrupted(how) | {"rank": rank}
    if code == -signal.SIGKILL:
        how = f"was killed ({how_killed(kills)})"
    elif code < 0:
        how = f"died of signal {-code} ({signal.strsignal(-code)}); see {run}/logs/rank-{rank}.log"
    else:
        how = f"ended with exit code {code} and no message"
    return {"status": "failed", "error": f"rank {rank} {how}", "rank": rank}


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free port for rank 0's store.

    On Linux it stays reserved inside the block: bound without listening, so that the system gives
    it to no other process, while one that asks for this very port can have it.
    """
    dual = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        reserved.bind(("", 0))
        port = reserved.getsockname()[1]
        if sys.platform != "linux":
            reserved.close()
        yield port


def gpu_count() -> int:
    """Return the number of visible GPUs; import torch only where the machine may have any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return 0
    drivers = ("/proc/driver/nvidia/gpus", "/dev/dxg", "/dev/kfd")
    if sys.platform == "linux" and not any(map(os.path.exists, drivers)):
        return 0
    import torch

    return torch.cuda.device_count()


def visible_gpus() -> list[str]:
    """Return the visible GPUs by the names that `CUDA_VISIBLE_DEVICES` uses."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(gpu_count())]


def limit_spinning() -> None:
    """Limit how long OpenMP threads of this process and its children spin, unless the user has.

    GNU OpenMP's default (300,000 turns of a loop) burns the time of other processes, and of the
    thread that it waits for, as soon as the machine has something else to do; sleeping at once
    costs time too. `launch/bench threads` measures both. It takes effect where torch has not been
    imported: the library reads the variable when it is loaded.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
