"""Child processes that end together, and are asked to stop before they are made to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditty_di.parent_death import lifeline
from ditty_di.stop_signals import StopSignals

_POLL_SECONDS = 0.05
# What the others have after one has failed: with a message (exit code 1) it may have left them in
# the middle of a save; one that was killed leaves nothing to wait for.
_AFTER_ERROR_SECONDS = 10.0
_AFTER_DEATH_SECONDS = 2.0


@dataclass
class Start:
    """A command to run; `popen` are further arguments of `subprocess.Popen`."""

    command: Sequence[str]
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    popen: dict[str, Any] = field(default_factory=dict)


class Children:
    """Run commands at the same time, each in a session of its own; end all when one fails.

    A session of its own means that a Ctrl-C in the terminal reaches only this process. The children
    end when this process does, however it ends (`ditty_di.parent_death`).

    Args:
        ask: called with the processes and the first SIGINT, SIGTERM or SIGHUP; should make them
            stop.
        grace_seconds: after that signal the processes are killed when they have not ended.

    `signalled` is the first signal that came, or None; `quit` tells that a second Ctrl-C killed the
    processes, `overdue` that the grace did. `ended` lists the indices of the processes that ended
    by themselves, in that order.
    """

    def __init__(
        self,
        ask: Callable[[list[subprocess.Popen], signal.Signals], None],
        grace_seconds: float,
    ) -> None:
        self.ask = ask
        self.grace_seconds = grace_seconds
        self.signalled: signal.Signals | None = None
        self.quit = self.overdue = False
        self.ended: list[int] = []
        self._processes: list[subprocess.Popen] = []
        self._deadline = float("inf")

    def run(self, starts: Sequence[Start]) -> list[int]:
        """Return the exit codes, as `subprocess` counts: minus the signal's number if one killed.

        Raises:
            OSError: a command cannot be started; those that were are killed.
        """
        with StopSignals(self._asked, self._insisted), lifeline() as line:
            try:
                for start in starts:
                    self._processes.append(
                        subprocess.Popen(
                            start.command,
                            env=start.env | line.env,
                            pass_fds=(line.descriptor,),
                            start_new_session=True,
                            **start.popen,
                        )
                    )
                if self.signalled is not None:  # before all were there
                    self.ask(self._processes, self.signalled)
                self._wait()
            finally:
                self._kill()
        return [process.wait() for process in self._processes]

    def _wait(self) -> None:
        """Return once all have ended, or the rest is to be killed."""
        running = dict(enumerate(self._processes))
        failed_at = float("inf")
        patience = 0.0
        while running and not self.quit:
            now = time.monotonic()
            if now > self._deadline:
                self.overdue = True
            if self.overdue or now > failed_at + patience:
                return
            codes = {i: code for i, p in running.items() if (code := _end_of(p)) is not None}
            # A death by signal comes before the failures that it causes.
            for index, code in sorted(codes.items(), key=lambda item: item[1]):
                del running[index]
                self.ended.append(index)
                if code != 0 and failed_at == float("inf"):
                    failed_at = now
                    patience = _AFTER_ERROR_SECONDS if code == 1 else _AFTER_DEATH_SECONDS
            if not codes:
                time.sleep(_POLL_SECONDS)

    def _kill(self) -> None:
        """Kill what still runs, and what failed processes have left in their groups."""
        for process in self._processes:
            if _end_of(process) != 0:
                _kill_group(process)
        for process in self._processes:
            process.wait()

    def _asked(self, number: signal.Signals) -> None:
        self.signalled = number
        self._deadline = time.monotonic() + self.grace_seconds
        self.ask(self._processes, number)

    def _insisted(self) -> None:
        self.quit = True


def _end_of(process: subprocess.Popen) -> int | None:
    """Return the exit code of an ended process, None while it runs.

    It stays unreaped, so that its process id, and that of its group, remain its own.
    """
    if process.returncode is not None or not hasattr(os, "waitid"):  # macOS before Python 3.13
        return process.poll()
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
