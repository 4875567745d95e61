"""SIGTERM, SIGINT and SIGHUP as requests to stop.

The first one asks. A scheduler may send SIGTERM and SIGHUP again, to the process and to its group:
that changes nothing. A second Ctrl-C means that somebody does not want to wait.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)

#: Whether this process only runs a job and ends with it (set by its entry point). Once asked to
#: stop it then ignores further SIGTERM and SIGHUP to its end, so that it can still say how it went.
ends_with_job = False
_asked = False  # by any signal, through any of the objects below

_SAME_PRESS_SECONDS = 0.25  # a key that bounces, or one signal to a group and to each process


class StopSignals:
    """Handlers of the stop signals, between `install` and `restore`.

    Args:
        ask: called with the first signal.
        insist: called when Ctrl-C follows it.

    `first` is the first signal that came, None until then. Signals that were ignored before
    (`nohup`) stay ignored. Outside the main thread nothing is installed: its owner handles signals.
    """

    def __init__(
        self, ask: Callable[[signal.Signals], None], insist: Callable[[], None] | None = None
    ) -> None:
        self.ask = ask
        self.insist = insist or quit_without_saving
        self.first: signal.Signals | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._received)

    def restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            if _asked and ends_with_job and number != signal.SIGINT:
                handler = signal.SIG_IGN
            signal.signal(number, handler)

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _received(self, number: int, frame: Any) -> None:
        global _asked
        _asked = True
        if self.first is None:
            self.first, self._asked_at = signal.Signals(number), time.monotonic()
            self.ask(self.first)
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > _SAME_PRESS_SECONDS:
            self.insist()


def quit_without_saving() -> None:
    raise KeyboardInterrupt("quit without saving")


def announce(number: signal.Signals) -> None:
    """Say on standard error that the run stops. Safe in a signal handler."""
    what = "stopping after this step and saving"
    if number == signal.SIGINT:
        say_at_once(f"{what}; press Ctrl-C again to quit without saving")
    else:
        say_at_once(f"{number.name}: {what}")


def say_at_once(line: str) -> None:
    """Write a line to standard error past Python's buffers, which a handler may have interrupted.

    On a terminal it replaces the line that is drawn there (a progress bar, the echo of ^C).
    """
    try:
        clear = "\r\x1b[K" if sys.__stderr__ is not None and os.isatty(2) else ""
        os.write(2, f"{clear}{line}\n".encode())
    except OSError:  # the terminal is gone
        pass
