"""Worker processes of data loaders: how they start, and what they leave alone."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator

from ditty_di.launch import parent_death
from ditty_di.launch.signals import SIGNALS

# A worker must not collect garbage of the process that it is forked from: the destructor of a gloo
# process group waits for threads, which a fork does not have, and the worker hangs (torch 2.13).
os.register_at_fork(after_in_child=gc.freeze)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block the stop signals while workers start, which inherit the mask until they ignore them.

    Not with a fork server: the mask would stay with the server, and so with all its children.
    """
    if multiprocessing.get_start_method() == "forkserver":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(of_main_thread: bool, worker: int) -> None:
    """Let a worker end with its parent, and ignore the stop signals, which the trainer handles.

    Args:
        of_main_thread: Whether the worker was started by its parent's main thread.
        worker: Its number.
    """
    if of_main_thread:  # a thread that ends before the process would end the worker too
        parent_death.die_with_parent_thread()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
