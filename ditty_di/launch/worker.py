"""Run one rank: build the task of a resolved configuration, and report how it ended.

Imports no Hydra, and torch only when a node needs it. Nothing here communicates with other ranks,
least of all after a failure: waiting for a dead rank would never end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ditty_di.config import Graph
from ditty_di.config.targets import TargetError
from ditty_di.console import LAUNCHED, Console, quiet_imports
from ditty_di.launch import hang, parent_death, signals
from ditty_di.launch.failure import (
    COMMUNICATION,
    describe,
    exit_code,
    how_killed,
    oom_kills,
    report,
)
from ditty_di.launch.rundir import GOOD_STATUSES, RunDirectory

_exit_code: int | None = None  # with which the process ends at once
_File: Any = io.IOBase.__base__  # of all files; the abstract class is slow to compare with


def main(run_dir: str | Path) -> int:
    """Run the task of a run directory as the rank of the environment variable RANK.

    The task's dict, with `status` and `seconds` added, becomes `result.json` (rank 0 writes it).
    A failing rank leaves its traceback in `logs/rank-N.log` and its message in
    `logs/error-rank-N.json`; the first one to fail also prints it and writes `result.json`.

    Args:
        run_dir: a prepared run directory.

    Returns:
        The exit code, 0 when the task finished or was preempted.
    """
    run = RunDirectory(run_dir)
    rank = int(os.environ.get("RANK", "0"))
    started, kills = time.time(), oom_kills()
    quiet_imports()
    log = run.logs / f"rank-{rank}.log"
    graph: Graph | None = None
    handlers = signals.StopSignals(_interrupt)
    if "WORLD_SIZE" not in os.environ:
        handlers.install()  # one of several ranks ends by the signal: it may wait in native code
    try:
        with (
            Console(log, show=rank == 0) as console,
            hang.stacks_on_signal(console.log),
            hang.stacks_on_request(run),
        ):
            try:
                run.join(rank)
                graph = Graph.load(run.to_build)
                for node in graph.nodes("task").values():
                    with contextlib.suppress(TargetError):  # told with its key when it is built
                        graph.locate(node.target)
                collect_garbage()  # no earlier, so that importing does not
                made = graph.build("task")
                if isinstance(made, functools.partial):  # it works on the graph
                    made = made(graph)
                result = {"status": "finished"} | (made or {})
                handlers.ask = handlers.insist = _ignore
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                handlers.ask = handlers.insist = _ignore
                failure = describe(error, graph, rank, how_killed(kills))
                failure |= {"rank": rank, "seconds": time.time() - started}
                console.log_only(failure["traceback"])
                if failure["status"] == "interrupted":
                    failure["error"] += run.resume_point()
                elif hang.is_communication(error):
                    failure["cause"] = COMMUNICATION
                    if found := hang.diagnose(error, run, rank):
                        if "step" in failure:
                            found["error"] = f"step {failure['step']}: {found['error']}"
                        failure |= found
            else:
                if rank == 0:
                    run.write_result(result | {"seconds": time.time() - started})
                run.release()
                return 0 if result["status"] in GOOD_STATUSES else 1
        return _fail(run, failure)
    finally:
        handlers.restore()


def _interrupt(number: signal.Signals) -> None:
    """End a rank that is outside the training loop, as Ctrl-C does."""
    raise KeyboardInterrupt(f"{number.name} outside the training loop")


def _ignore(*number: signal.Signals) -> None:
    """Go on: the task is over, and only its result is still to be written."""


def _fail(run: RunDirectory, failure: dict[str, Any]) -> int:
    """Report a failure, unless another rank was first; end the ranks that hang."""
    if not _debug(run):
        del failure["traceback"]
    hanging = failure.pop("pids", ())
    try:
        first = run.write_error(failure)
    except OSError:  # a full disk may be what failed
        first = True
    if first and LAUNCHED not in os.environ:
        report(run, failure)
    run.release()
    for pid in hanging:  # otherwise they would run into another timeout
        os.kill(pid, signal.SIGKILL)
    return exit_code(failure)


def _debug(run: RunDirectory) -> bool:
    try:
        return bool(Graph.load(run.to_build).build("debug"))
    except Exception:  # the configuration itself may be what is broken
        return False


def own_process() -> None:
    """Prepare a process that only runs one job; call it first.

    The process ends with its parent, and its data loader workers with it; once asked to stop, it
    is not killed by a repeated request. It collects no garbage before its job is known: what
    modules make stays.
    """
    gc.disable()
    parent_death.follow_parent()
    parent_death.take_forks_along()
    signals.ends_with_job = True
    atexit.register(_end_at_once)  # the first that is registered is the last that is called


def collect_garbage() -> None:
    """End what `own_process` began; modules are exempt from collection from here on."""
    if signals.ends_with_job:
        gc.freeze()
        gc.enable()


def leave(code: int) -> None:
    """Exit. One of several ranks does not wait for threads or process groups.

    After a failure they would wait for other ranks; and on torch 2.15 gloo's threads may outlive
    the interpreter, which ends a rank that succeeded with a signal (pytorch#179291).

    Otherwise exit handlers are the last that is called, and what open files hold is written:
    freeing torch's modules would take a second.

    Args:
        code: the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the terminal, or the reader of the pipe, is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    global _exit_code
    _exit_code = code
    sys.exit(code)


def _end_at_once() -> None:
    if _exit_code is not None:
        logging.shutdown()  # registered earlier
        gc.collect()  # what the job has left, with its finalizers
        gc.unfreeze()
        for file in gc.get_objects():
            if issubclass(type(file), _File):
                with contextlib.suppress(Exception):  # closed, or its disk is full
                    file.flush()
        os._exit(_exit_code)
