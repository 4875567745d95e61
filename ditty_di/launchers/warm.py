"""Jobs in processes forked from a warm parent that has imported what a training needs.

Importing torch and torchtitan takes seconds. A sweep's jobs are forked from one process that has
done so, and that has used neither a device nor a thread (`multiprocessing`'s fork server). Where
forking after such imports is not safe (macOS, Windows), each job is a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from ditty_di import parent_death
from ditty_di.console import QUIET
from ditty_di.stop_signals import StopSignals

#: Environment variable of the warm parent: the targets that it imports, separated by spaces.
TARGETS = "DITTY_DI_WARM_TARGETS"

_POLL_SECONDS = 0.05


@dataclass
class Job:
    """A command line for `python -m ditty_di`.

    `code` is the exit code once it has ended: minus the signal's number if one killed it.
    """

    arguments: Sequence[str]
    code: int | None = None


class WarmJobs:
    """Run jobs, as many at once as there are slots; the processes end when this one does.

    A slot is environment variables that the job in it gets (the GPUs that it may use).

    The first SIGINT, SIGTERM or SIGHUP asks the running jobs to stop (SIGTERM) and starts no more;
    a second Ctrl-C, or `grace_seconds` after the first signal, kills them. `signalled` is the first
    signal that came, or None.
    """

    def __init__(
        self, slots: Sequence[Mapping[str, str]] = ({},), grace_seconds: float = 300.0
    ) -> None:
        self.slots, self.grace_seconds = slots, grace_seconds
        self.signalled: signal.Signals | None = None
        self._deadline = float("inf")
        self._running: dict[int, tuple[BaseProcess, Job]] = {}  # by slot

    def run(self, jobs: Sequence[Job], ended: Callable[[Any], None]) -> None:
        """Run the jobs in their order; call `ended` with each as it ends."""
        context: Any = _context()
        waiting = list(jobs)
        with StopSignals(self._asked, self._insisted):
            try:
                while (waiting and not self.signalled) or self._running:
                    for slot, env in enumerate(self.slots):
                        if waiting and slot not in self._running and not self.signalled:
                            job = waiting.pop(0)
                            process = context.Process(
                                target=_job, args=(list(job.arguments), dict(env))
                            )
                            process.start()
                            self._running[slot] = process, job
                    if time.monotonic() > self._deadline:
                        self._signal(signal.SIGKILL)
                    for slot, (process, job) in list(self._running.items()):
                        if process.exitcode is not None:
                            del self._running[slot]
                            job.code = process.exitcode
                            ended(job)
                    time.sleep(_POLL_SECONDS)
            finally:
                self._signal(signal.SIGKILL)

    def _asked(self, number: signal.Signals) -> None:
        self.signalled = number
        self._deadline = time.monotonic() + self.grace_seconds
        self._signal(signal.SIGTERM)

    def _insisted(self) -> None:
        self._deadline = 0.0

    def _signal(self, number: signal.Signals) -> None:
        for process, _ in list(self._running.values()):
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)


def _context() -> BaseContext:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ditty_di.launchers.warm_imports"])
    return context


def _job(arguments: list[str], env: dict[str, str]) -> None:
    """Run a job; the entry point of its process."""
    if hasattr(os, "setsid"):
        os.setsid()  # a Ctrl-C in the terminal reaches the sweep alone
    server = os.getppid()
    parent_death.die_with_parent_thread()
    if server == 1 or os.getppid() != server:
        sys.exit(1)  # the sweep ended meanwhile
    os.environ.update(env)
    os.environ.setdefault(QUIET, "1")
    sys.argv = ["ditty_di", *arguments]
    runpy.run_module("ditty_di", run_name="__main__", alter_sys=True)
