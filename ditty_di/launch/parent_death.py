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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Environment variable of a started process: the parent's process id and the pipe's descriptor.
PARENT = "DITTY_DI_PARENT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def lifeline() -> Iterator[int]:
    """Open a pipe that children started in this block watch with `follow_parent`.

    Yields:
        The descriptor of its reading end, for `pass_fds` of `subprocess.Popen` and `lifeline_env`.
    """
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def lifeline_env(descriptor: int) -> dict[str, str]:
    """Return the environment variable that makes `follow_parent` watch this process.

    Args:
        descriptor: what `lifeline` yielded.
    """
    return {PARENT: f"{os.getpid()}:{descriptor}"}


def follow_parent() -> None:
    """End this process as soon as the process that started it with a `lifeline` ends.

    Does nothing in a process that was started otherwise. Call it as early as possible.
    """
    given = os.environ.pop(PARENT, None)
    if given is None:
        return
    parent, descriptor = map(int, given.split(":"))
    # With a wrapper script between the two, the kernel would follow the wrapper.
    by_kernel = die_with_parent_thread() and os.getppid() == parent
    if select.select([descriptor], [], [], 0)[0]:
        _end()  # the parent ended before the kernel was asked
    if by_kernel:
        os.close(descriptor)
    else:
        end_after(lambda: os.read(descriptor, 1))


def die_with_parent_thread() -> bool:
    """Ask the kernel to kill this process when the thread that started it ends (Linux only).

    Children do not inherit it.

    Returns:
        Whether the kernel was asked.
    """
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0


def take_forks_along() -> None:
    """Make processes that the main thread forks from now on (data loader workers) end with it.

    Forks of other threads are left out: the kernel would kill them when their thread ends.
    """
    by_main_thread = False

    def before() -> None:
        nonlocal by_main_thread
        by_main_thread = in_main_thread()

    def in_child() -> None:
        if by_main_thread:
            die_with_parent_thread()

    os.register_at_fork(before=before, after_in_child=in_child)


def in_main_thread() -> bool:
    """Return whether the caller runs in the main thread."""
    return threading.current_thread() is threading.main_thread()


def end_after(wait: Callable[[], object]) -> None:
    """Kill this process when a function, called in a thread of its own, returns.

    Args:
        wait: blocks until the process has to end.
    """

    def run() -> None:
        wait()
        _end()

    threading.Thread(target=run, daemon=True).start()


def _end() -> None:
    """Kill this process, and its group if it leads one (its forked workers belong to it)."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
