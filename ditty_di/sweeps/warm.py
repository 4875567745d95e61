"""Run jobs in processes forked from a warm parent that has imported what a training needs.

Importing torch and torchtitan takes seconds. The jobs of a sweep are forked from one process that
has done so and that has used neither a device nor a thread (`multiprocessing`'s fork server). Where
forking after such imports is not safe (macOS), each job is a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from ditty_di.console import QUIET
from ditty_di.launch import parent_death
from ditty_di.launch.signals import StopSignals
from ditty_di.replaced import replaced

#: Environment variable of the warm parent: the targets that it imports, separated by spaces.
TARGETS = "DITTY_DI_WARM_TARGETS"

#: Environment variable without which importing pyarrow starts a thread of its allocator (jemalloc):
#: one that a fork may catch in the middle of something.
ARROW_WITHOUT_THREAD = ("JE_ARROW_MALLOC_CONF", "background_thread:false")

_POLL_SECONDS = 0.05


class WarmJobs:
    """Run command lines, as many at once as there are slots; they end when this process does.

    The first SIGINT, SIGTERM or SIGHUP asks the running jobs to stop (SIGTERM), and no more are
    started. A second Ctrl-C, or `grace_seconds` after the first signal, kills them.

    Args:
        slots: for each job that may run at a time, the environment variables that it gets.
        grace_seconds: time in seconds that jobs may take to stop.

    Attributes:
        signals: the stop signals; `signals.first` is the first one received.
    """

    def __init__(
        self, slots: Sequence[Mapping[str, str]] = ({},), grace_seconds: float = 300.0
    ) -> None:
        self.slots, self.grace_seconds = slots, grace_seconds
        self.signals = StopSignals(lambda number: self._kill(signal.SIGTERM), self._insisted)
        self._running: dict[int, tuple[int, BaseProcess]] = {}  # by slot: number of the job
        self._quit = False

    def run(self, commands: Iterable[Sequence[str]], ended: Callable[[int, int], None]) -> None:
        """Run the commands in their order.

        Args:
            commands: arguments of `python -m ditty_di`, one sequence for each job; the next one is
                taken when a slot is free.
            ended: called with the job's index and exit code (minus the signal's number if one
                killed it) as each job ends.
        """
        # The fork server, not fork: the process that the jobs come from has no threads.
        method = "forkserver" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            os.environ.setdefault(*ARROW_WITHOUT_THREAD)
            context.set_forkserver_preload(["ditty_di.sweeps.warm_imports"])
        waiting = enumerate(commands)
        more = True
        with self.signals:
            try:
                while (more and not self.signals.first) or self._running:
                    for slot, env in enumerate(self.slots):
                        if more and slot not in self._running and not self.signals.first:
                            number, command = next(waiting, (0, None))
                            if command is None:
                                more = False
                                break
                            process = context.Process(target=_job, args=(list(command), dict(env)))
                            _start(process)
                            self._running[slot] = number, process
                    if self._quit or self.signals.seconds_since_first() > self.grace_seconds:
                        self._kill(signal.SIGKILL)
                    for slot, (number, process) in list(self._running.items()):
                        if process.exitcode is not None:
                            del self._running[slot]
                            ended(number, process.exitcode)
                    time.sleep(_POLL_SECONDS)
            finally:
                self._kill(signal.SIGKILL)

    def _insisted(self) -> None:
        self._quit = True

    def _kill(self, number: signal.Signals) -> None:
        for _, process in list(self._running.values()):
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)


def _start(process: BaseProcess) -> None:
    """Start a process that does not import the caller's `__main__` again.

    Jobs need nothing of it, and a script that calls `ditty_di.__main__.main` without a guard would
    start its sweep once more in each of them.
    """
    with replaced(sys.modules, "__main__", ModuleType("__main__")):
        process.start()


def _job(arguments: list[str], env: dict[str, str]) -> None:
    """Run a job; the entry point of its process."""
    os.setsid()  # a Ctrl-C in the terminal reaches only the sweep
    # The fork server lives as long as any of its jobs: they have to watch the sweep themselves.
    sweep: Any = multiprocessing.parent_process()
    parent_death.end_after(sweep.join)
    parent_death.die_with_parent_thread()
    os.environ.update(env)
    os.environ.setdefault(QUIET, "1")
    sys.argv = ["ditty_di", *arguments]
    runpy.run_module("ditty_di", run_name="__main__", alter_sys=True)
