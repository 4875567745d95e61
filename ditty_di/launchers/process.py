"""One child process that is asked to stop before it is made to."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_POLL_SECONDS = 0.2


class Child:
    """Runs a command in a session of its own, so that a Ctrl-C reaches only this process.

    The first SIGINT, SIGTERM or SIGHUP calls `ask`; a second one, or `grace_seconds` after the
    first, kills. `signalled` is the first signal that came, or None; `killed` tells the rest.
    """

    def __init__(self, ask: Callable[[subprocess.Popen], None], grace_seconds: float) -> None:
        self.ask = ask
        self.grace_seconds = grace_seconds
        self.signalled: signal.Signals | None = None
        self.killed = False
        self._deadline = float("inf")
        self._process: subprocess.Popen | None = None

    def run(self, command: Sequence[str], **popen: Any) -> int:
        """The exit code, as `subprocess` counts: minus the signal's number if one killed it."""
        with self._signals():
            self._process = subprocess.Popen(command, start_new_session=True, **popen)
            while True:
                try:
                    return self._process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    if time.monotonic() > self._deadline:
                        self.killed = True
                        self._process.kill()
                        return self._process.wait()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signalled is not None:
            self._deadline = 0.0
            return
        self.signalled = signal.Signals(number)
        self._deadline = time.monotonic() + self.grace_seconds
        if self._process is not None:
            self.ask(self._process)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before: dict[int, Any] = {}
        try:
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                # What is ignored already (nohup) stays ignored.
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not the main thread: whoever owns it handles signals
            before.clear()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
