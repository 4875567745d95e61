"""Rank processes that end together, and are asked to stop before they are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ditty_di.launch.parent_death import lifeline, lifeline_env
from ditty_di.launch.signals import StopSignals

_POLL_SECONDS = 0.05
# How long the others may go on after one has failed. One that reported an error (exit code 1) may
# have left them in the middle of a save; after one that was killed there is nothing to wait for.
AFTER_ERROR_SECONDS = 10.0
_AFTER_DEATH_SECONDS = 2.0


@contextlib.contextmanager
def repeating(do: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call a function again and again in a thread of its own within the context.

    Args:
        do: the function.
        seconds: time between two calls, and before the first.
    """
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            do()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Children:
    """Run commands at the same time, each in its own session; end all when one fails.

    May be used several times in a row; the stop signals are caught in `with children.signals`.

    Because of the separate sessions a Ctrl-C in the terminal reaches this process only. The
    children end when this process does, however it ends (`ditty_di.launch.parent_death`).

    Args:
        ask: called with the first SIGINT, SIGTERM or SIGHUP; should make the processes stop.
        grace_seconds: time in seconds after that signal until they are killed.

    Attributes:
        signals: the stop signals; `signals.first` is the first one received.
        quit: whether a second Ctrl-C killed the processes.
        overdue: whether they were killed because `grace_seconds` had passed.
        ended: indices of the processes that ended by themselves, in that order.
    """

    def __init__(self, ask: Callable[[signal.Signals], None], grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.signals = StopSignals(ask, self._insisted)
        self.quit = self.overdue = False
        self.ended: list[int] = []
        self._processes: list[subprocess.Popen] = []

    def run(
        self, commands: Sequence[dict[str, Any]], watch: Callable[[], float | None] | None = None
    ) -> list[int]:
        """Run the commands and return their exit codes (minus the signal's number if one killed).

        Args:
            commands: keyword arguments of `subprocess.Popen` for each process, with `env`.
            watch: called again and again while they run; returns in how many seconds the processes
                have to end for a reason from outside, or None.

        Raises:
            OSError: a command cannot be started; the ones already started are killed.
        """
        self.ended = []
        self._processes = processes = []
        with lifeline() as pipe:
            try:
                for command in commands:
                    env = command["env"] | lifeline_env(pipe)
                    options = {"pass_fds": (pipe,), "start_new_session": True}
                    processes.append(subprocess.Popen(**command | options | {"env": env}))
                self._wait(processes, watch)
            finally:
                for process in processes:
                    if process.poll() is None:
                        _kill_group(process)
        return [process.wait() for process in processes]

    def terminate(self) -> None:
        """Send SIGTERM to the processes that run."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)  # does nothing once it has ended

    def _wait(
        self, processes: list[subprocess.Popen], watch: Callable[[], float | None] | None
    ) -> None:
        """Return once all have ended, or the rest is to be killed."""
        running = dict(enumerate(processes))
        patience_ends = float("inf")
        while running and not self.quit and time.monotonic() < patience_ends:
            self.overdue = self.signals.seconds_since_first() > self.grace_seconds
            if self.overdue:
                return
            if watch is not None and (seconds := watch()) is not None:
                watch = None
                patience_ends = min(patience_ends, time.monotonic() + seconds)
            codes = {i: c for i, process in running.items() if (c := process.poll()) is not None}
            # A death by a signal (negative code) precedes the failures that it causes.
            for index, code in sorted(codes.items(), key=lambda item: item[1]):
                process = running.pop(index)
                self.ended.append(index)
                if code:
                    _kill_group(process)  # what it has left, such as data loader workers
                    patience = AFTER_ERROR_SECONDS if code == 1 else _AFTER_DEATH_SECONDS
                    patience_ends = min(patience_ends, time.monotonic() + patience)
            if not codes:
                time.sleep(_POLL_SECONDS)

    def _insisted(self) -> None:
        self.quit = True


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
