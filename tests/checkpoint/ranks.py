"""Runs functions in real processes over gloo, forked from a server that has imported torch."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.warm import context

#: A folder in memory, where syncing files to disk costs no time; None where there is none.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

#: Exit code of a rank that ended itself on purpose.
KILLED = 41


def run(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(*args)` on every rank of a new process group; what each returned.

    Raises:
        AssertionError: a rank failed; the message has its traceback.
    """
    results, codes = run_dying(function, ranks, *args, timeout=timeout)
    failures = [r for r in results if isinstance(r, _Failure)]
    assert not failures, "\n".join(f.traceback for f in failures)
    assert codes == [0] * ranks, codes
    return results


def run_dying(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120
) -> tuple[list[Any], list[int | None]]:
    """As `run`, for ranks that may die: (what each returned or None, exit codes)."""
    return Group(function, ranks, *args).wait(timeout)


class Group:
    """`function(*args)` started on every rank of a new process group."""

    def __init__(self, function: Callable[..., Any], ranks: int, *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self._processes, self._pipes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(sender, self._folder.name, rank, ranks, function, args)
            )
            process.start()
            sender.close()
            self._processes.append(process)
            self._pipes.append(receiver)

    def wait(self, timeout: float = 120) -> tuple[list[Any], list[int | None]]:
        """(what each rank returned or None, exit codes)."""
        results = []
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            try:
                results.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout) else None)
            except EOFError:
                results.append(None)
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
        return results, [process.exitcode for process in self._processes]


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.traceback = "".join(traceback.format_exception(error))
        self.message = str(error)


def _rank(
    pipe: Any, folder: str, rank: int, ranks: int, function: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=180)
    )
    try:
        result = function(*args)
    except BaseException as error:
        result = _Failure(error)
    pipe.send_bytes(pickle.dumps(result))
    # Not through the interpreter's end: a peer may have died, and nobody is to wait for it.
    os._exit(1 if isinstance(result, _Failure) else 0)
