"""SIGTERM, SIGINT and SIGHUP as requests to stop.

The first signal asks for a stop. Schedulers may send SIGTERM and SIGHUP again, to the process and
to its group: repetitions are ignored. A second Ctrl-C means: quit without saving.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Whether this process runs one job and exits (set by its entry point). Once asked to stop it then
#: ignores further SIGTERM and SIGHUP until it exits, so that it can still report its result.
ends_with_job = False
_asked = False  # by any signal, through any StopSignals object

_SAME_PRESS_SECONDS = 0.25  # a bouncing key, or one signal to the group and to each process


class StopSignals:
    """Handlers of the stop signals, active between `install` and `restore` (or as a context).

    Signals that were ignored before (`nohup`) stay ignored. Outside the main thread nothing is
    installed: whoever owns the main thread handles signals.

    Args:
        ask: called with the first signal.
        insist: called when Ctrl-C follows it; by default it raises KeyboardInterrupt.

    Attributes:
        first: the first signal received, None before that.
    """

    def __init__(
        self, ask: Callable[[signal.Signals], None], insist: Callable[[], None] | None = None
    ) -> None:
        self.ask = ask
        self.insist = insist or quit_without_saving
        self.first: signal.Signals | None = None
        self._first_at = 0.0
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._received)

    def restore(self) -> None:
        """Restore the previous handlers."""
        while self._previous:
            number, handler = self._previous.popitem()
            if _asked and ends_with_job and number != signal.SIGINT:
                handler = signal.SIG_IGN
            signal.signal(number, handler)

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def seconds_since_first(self) -> float:
        """Return the time since the first signal in seconds, 0 before that."""
        return time.monotonic() - self._first_at if self.first else 0.0

    def _received(self, number: int, frame: Any) -> None:
        global _asked
        _asked = True
        if self.first is None:
            self.first, self._first_at = signal.Signals(number), time.monotonic()
            self.ask(self.first)
        elif number == signal.SIGINT and self.seconds_since_first() > _SAME_PRESS_SECONDS:
            self.insist()


def quit_without_saving() -> None:
    """Raise KeyboardInterrupt."""
    raise KeyboardInterrupt("quit without saving")


def announce(number: signal.Signals) -> None:
    """Print on standard error that the run stops. Safe inside a signal handler.

    Args:
        number: the signal that asked for it.
    """
    action = "stopping after this step and saving"
    if number == signal.SIGINT:
        print_unbuffered(f"{action}; press Ctrl-C again to quit without saving")
    else:
        print_unbuffered(f"{number.name}: {action}")


def print_unbuffered(line: str) -> None:
    """Print to standard error past Python's buffers, which a signal handler may have interrupted.

    Args:
        line: on a terminal it replaces the line drawn there (a progress bar, the echo of ^C).
    """
    try:
        clear = "\r\x1b[K" if sys.__stderr__ is not None and os.isatty(2) else ""
        os.write(2, f"{clear}{line}\n".encode())
    except OSError:  # the terminal is gone
        pass
