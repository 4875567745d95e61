"""Ranks on several machines, which may fail, vanish and come back.

The machines meet through torch's elastic rendezvous (`rendezvous.py`). The ranks are supervised by
`Local`, as on one machine, and not by torch's agent: it answers SIGTERM by ending the ranks within
30 s instead of letting them save, and each machine counts restarts for itself.
"""

from __future__ import annotations

import atexit
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from ditty_di.config import ConfigError
from ditty_di.config.early import validated
from ditty_di.console import status
from ditty_di.launch.failure import report
from ditty_di.launch.local import Group, Local, reserved_port
from ditty_di.launch.processes import AFTER_ERROR_SECONDS, Children
from ditty_di.launch.rendezvous import Rendezvous, Round, watching
from ditty_di.launch.rundir import GOOD_STATUSES, RunDirectory


@validated
class Torchrun(Local):
    """Run the ranks of several machines; the same command is typed on each.

    The machine that becomes number 0 makes the run directory, which all have to see. After a
    failure on any of them, a lost machine included, all ranks start again from the last checkpoint,
    on the machines that are left if there are `min_nodes`. A machine that comes later, up to
    `max_nodes`, lets the ranks save and start again with it, which does not count as a restart.

    Args:
        rdzv_endpoint: `HOST:PORT` of the machine that keeps the rendezvous; None with one machine.
            If it is lost, the others wait for it to come back with the same command.
        rdzv_id: tells runs at the same endpoint apart.
        min_nodes: number of machines without which nothing starts; None is `max_nodes`.
        max_nodes: number of machines that may take part.
        nproc: number of ranks on this machine; None is one for each GPU, or one without a GPU.
        max_restarts: restarts after failures, see `Local`.
        grace_seconds: time in seconds that ranks may take to save when they are stopped.
        local_addr: address of this machine for the others; None is the one that it reaches
            `rdzv_endpoint` with.
        rdzv_conf: further settings of the rendezvous as for torchrun's `--rdzv-conf`, in seconds:
            `join_timeout` 600, `last_call_timeout` 30, `keep_alive_interval` 5, `read_timeout` 60.
        dry_run: print what would be started, and start nothing.

    Raises:
        ValueError: a number out of range, or several machines without an endpoint.
    """

    @staticmethod
    def validate(  # type: ignore[override]
        *,
        rdzv_endpoint: str | None = None,
        rdzv_id: str = "ditty_di",
        min_nodes: int | None = None,
        max_nodes: int = 1,
        nproc: int | None = None,
        max_restarts: int = 0,
        grace_seconds: float = 300.0,
    ) -> None:
        """Check the arguments without starting anything; see the class.

        Args:
            rdzv_endpoint: `HOST:PORT`.
            rdzv_id: name of the rendezvous.
            min_nodes: number of machines.
            max_nodes: number of machines.
            nproc: number of ranks.
            max_restarts: number of restarts.
            grace_seconds: in seconds.
        """
        Local.validate(nproc=nproc, max_restarts=max_restarts, grace_seconds=grace_seconds)
        least = max_nodes if min_nodes is None else min_nodes
        if not 1 <= least <= max_nodes:
            raise ValueError(
                f"launcher.min_nodes={min_nodes}, launcher.max_nodes={max_nodes}: give numbers of "
                "machines, at least 1, the first not above the second (null: both the same)"
            )
        if max_nodes > 1 and not rdzv_endpoint:
            raise ValueError(
                f"launcher.max_nodes={max_nodes}: give the address where the machines meet, "
                "launcher.rdzv_endpoint=HOST:PORT, the same on each; HOST is one of them"
            )
        port = (rdzv_endpoint or "").rpartition(":")[2]
        if rdzv_endpoint and ":" in rdzv_endpoint and not port.isdigit():
            raise ValueError(f"launcher.rdzv_endpoint={rdzv_endpoint}: write HOST:PORT")
        if not rdzv_id:
            raise ValueError("launcher.rdzv_id: give the name of the rendezvous")

    def __init__(
        self,
        rdzv_endpoint: str | None = None,
        rdzv_id: str = "ditty_di",
        min_nodes: int | None = None,
        max_nodes: int = 1,
        nproc: int | None = None,
        max_restarts: int = 0,
        grace_seconds: float = 300.0,
        local_addr: str | None = None,
        rdzv_conf: dict[str, Any] | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(nproc, grace_seconds, max_restarts, dry_run)
        self.nodes = (max_nodes if min_nodes is None else min_nodes, max_nodes)
        self.rendezvous = Rendezvous(
            rdzv_endpoint, rdzv_id, self.nodes, local_addr, dict(rdzv_conf or {})
        )
        self._run: RunDirectory | None = None
        self._round: Round | None = None
        self._regroup = False  # the ranks here were stopped because another machine waits,
        self._lost = False  # or because another one sends no heartbeat any more

    def follow(self) -> int | None:
        """Meet the other machines; take part if one of them has the run directory.

        Returns:
            The exit code; None if this machine has to make the directory and call this object.

        Raises:
            ConfigError: the machines do not meet, or do not see the same directory.
        """
        if self.dry_run:
            print(self._plan())
            return 0
        self._round = self._meet()
        path = self._round.run
        if path is None and self._round.node == 0:
            atexit.register(self._round.abandon)  # unless it is started
            return None
        run = RunDirectory(path or self._round.started()["run"])
        if not run.to_build.exists():
            raise ConfigError(
                f"{platform.node()} does not see the run directory {run.path}; put it on a file "
                "system that all machines share, at the same path: run=FOLDER"
            )
        code = self.supervise(run)
        result = run.read_result() or {"status": "ended"}
        print(f"{result['status']}: {run}")
        return code

    def __call__(self, run_dir: str | Path) -> int:
        """Run the ranks of this machine and return the exit code of the run.

        Args:
            run_dir: a prepared run directory.
        """
        run = RunDirectory(run_dir)
        if run.is_temporary() and self.nodes[1] > 1:
            raise ConfigError(
                "this task leaves no run, and its temporary directory is on one machine alone; "
                "type launcher=local"
            )
        return self.supervise(run)

    def supervise(self, run: RunDirectory) -> int:
        """Run the ranks of this machine, again after failures on any; return the exit code.

        Args:
            run: the run directory.
        """
        self._run = run
        try:
            return super().supervise(run)
        except KeyboardInterrupt as error:  # while no rank ran
            return report(run, run.interrupted(str(error) or "Ctrl-C"))
        except ConfigError as error:  # the machines did not meet again
            result = run.read_result()
            if result is None:
                return report(run, {"status": "failed", "error": f"{error}{run.resume_point()}"})
            print(error, file=sys.stderr)
            return int(result["status"] not in GOOD_STATUSES)
        finally:
            self.rendezvous.close()

    def _meet(self) -> Round:
        mine = {
            "run": None if self._run is None else str(self._run.path),
            "nproc": self.ranks_here(),
            "restarts": self.restarts.count,
        }
        found = self.rendezvous.meet(mine, self._finished)
        self.restarts.count = max(known["restarts"] for known in found.known)
        return found

    def _finished(self) -> bool:
        result = self._run.read_result() if self._run else None
        return result is not None and result["status"] in ("finished", "pruned")

    @contextmanager
    def group(self, run: RunDirectory, children: Children) -> Iterator[Group]:
        """Meet the other machines, and yield which ranks are this one's.

        Args:
            run: the run directory.
            children: what runs the ranks.
        """
        ask, children.signals.ask = children.signals.ask, _interrupt
        here = self._round = self._round or self._meet()
        self._regroup = self._lost = False
        with reserved_port() as port:
            if here.node == 0:
                run.join(None, alone=True)
                run.forget_end()
                address = (self.rendezvous.local_addr, port)
                here.start({"run": here.run or str(run.path), "address": address})
            address = here.started()["address"]
            if here.node:
                run.join(None)
            children.signals.ask = ask
            ranks = [known["nproc"] for known in here.known]
            if self.nodes[1] > 1:
                status(f"machine {here.node} of {len(ranks)}, {sum(ranks)} ranks in all")
            with watching(partial(self._look, here)) as seen:
                yield Group(
                    nproc=ranks[here.node],
                    world_size=sum(ranks),
                    address=(address[0], address[1]),
                    first=sum(ranks[: here.node]),
                    node=here.node,
                    nodes=len(ranks),
                    env=self.rendezvous.environment() if len(ranks) > 1 else {},
                    watch=partial(self._react, seen, children),
                )

    def _look(self, here: Round) -> str | None:
        """Return what has happened on other machines: `failed`, `waiting`, `lost`, or None."""
        if here.failed():
            return "failed"
        if self.rendezvous.others_wait():
            return "waiting"
        lost = self.rendezvous.lost(len(here.known)) and not here.ending()
        return "lost" if lost else None

    def _react(self, seen: list[str], children: Children) -> float | None:
        """Return in how many seconds the ranks of this machine have to end, or None."""
        if not seen:
            return None
        self._lost = seen[0] == "lost"
        if seen[0] in ("failed", "lost"):
            return AFTER_ERROR_SECONDS
        self._regroup = True
        children.terminate()
        return self.grace_seconds

    def agree(
        self, run: RunDirectory, group: Group, failure: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, bool]:
        """Return the first failure on any machine, and whether to start again without one.

        Args:
            run: the run directory.
            group: what this machine has started.
            failure: the failure on this machine.
        """
        here, self._round = self._round, None
        assert here is not None
        if failure is not None and self._lost:
            failure = {"status": "failed", "error": f"a machine was lost; see {run}/logs"}
        try:
            if failure is not None and not here.failed() and self._regroups():
                return None, True
            failure = here.settle(failure, self.rendezvous.others_wait)
            if failure is not None:
                return failure, False
            result = run.read_result() or {}
            stopped = result.get("status") == "preempted" and not run.stop.exists()
            return None, stopped and self._regroups()
        except Exception:  # the store has ended with the machine that keeps it
            return failure, False

    def _regroups(self) -> bool:
        return self._regroup or self.rendezvous.others_wait()

    def _plan(self) -> str:
        least, most = self.nodes
        there = self.rendezvous
        lines = [
            f"on each of {least if least == most else f'{least} to {most}'} machines, "
            f"restarting at most {self.restarts.allowed} times:",
            f"  meet at {there} as {there.name!r}; this one is {there.local_addr}"
            f"{' and keeps it' if there.is_here() else ''}",
            f"  {self._plan_of_ranks()}",
        ]
        names = there.environment() if most > 1 else {}
        return "\n".join(lines + [f"  {name}={value}" for name, value in names.items()])


def _interrupt(number: Signals) -> None:
    """End a wait for other machines, as Ctrl-C does."""
    raise KeyboardInterrupt(f"{number.name} while waiting for other machines")
