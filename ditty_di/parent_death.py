"""End a process when its parent ends, however the parent ends (SIGKILL included).

On Linux the kernel does it (`prctl(PR_SET_PDEATHSIG)`). Elsewhere a thread reads a pipe whose other
end only the parent holds.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

#: Environment variable of a started process: the parent's process id and the pipe's descriptor.
PARENT = "DITTY_DI_PARENT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Lifeline:
    """A pipe through which a child notices that this process has ended.

    Args:
        descriptor: reading end of the pipe; belongs into `pass_fds` of `subprocess.Popen`.
    """

    descriptor: int

    @property
    def env(self) -> dict[str, str]:
        return {PARENT: f"{os.getpid()}:{self.descriptor}"}


@contextmanager
def lifeline() -> Iterator[Lifeline]:
    """Open the pipe for children that are started, and end, inside this context."""
    reading, writing = os.pipe()
    try:
        yield Lifeline(reading)
    finally:
        os.close(reading)
        os.close(writing)


def follow_parent() -> None:
    """End this process as soon as the process that started it with a `Lifeline` ends.

    Does nothing in a process that was started otherwise. To be called as early as possible.
    """
    given = os.environ.pop(PARENT, None)
    if given is None:
        return
    parent, descriptor = map(int, given.split(":"))
    # Another process may stand between the two (a wrapper script): the kernel would follow that.
    by_kernel = die_with_parent_thread() and os.getppid() == parent
    if select.select([descriptor], [], [], 0)[0]:
        _end()  # the parent ended before the kernel was asked
    if by_kernel:
        os.close(descriptor)
    else:
        threading.Thread(target=_end_after, args=(descriptor,), daemon=True).start()


def die_with_parent_thread() -> bool:
    """Ask the kernel to kill this process when the thread that started it ends (Linux only).

    Returns whether the kernel was asked. A child does not inherit it.
    """
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0


def take_forks_along() -> None:
    """From here on, processes that the main thread forks (data loader workers) end with this one.

    Not those of other threads: the kernel would kill them when the thread ends.
    """
    if sys.platform != "linux":
        return
    main_thread = False

    def before() -> None:
        nonlocal main_thread
        main_thread = in_main_thread()

    def in_child() -> None:
        if main_thread:
            die_with_parent_thread()

    os.register_at_fork(before=before, after_in_child=in_child)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end_after(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    _end()


def _end() -> None:
    """Kill this process, and its group if it leads one (its forked workers belong to it)."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
