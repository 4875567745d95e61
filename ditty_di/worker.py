"""What a rank runs: `python -m ditty_di.worker RUN_DIR` builds the task of a resolved config.

Imports no Hydra, and torch only when a node needs it. Nothing here talks to other ranks, least of
all when something failed: whoever waits for a dead rank waits for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditty_di.console import Console, place_streams, quiet_imports
from ditty_di.graph import ConfigError, Graph
from ditty_di.rundir import GOOD_STATUSES, RunDirectory

#: Set for ranks whose console is arranged, and whose failures are reported, by a launcher.
LAUNCHED = "DITTY_DI_LAUNCHED"


def main(run_dir: str | Path) -> int:
    """Runs the task; the exit code is 0 when it finished or was stopped in good order.

    The task's dict, with `status` and `seconds` added, becomes `result.json` (rank 0 writes it).
    A failing rank leaves its traceback in `logs/rank-N.log` and its message in
    `logs/error-rank-N.json`; the first one to fail also says it, and writes `result.json`.
    """
    run = RunDirectory(run_dir)
    rank = int(os.environ.get("RANK", "0"))
    started = time.time()
    quiet_imports()
    log = run.logs / f"rank-{rank}.log"
    with Console(log, show=rank == 0) as console, _sigterm_interrupts():
        try:
            graph = Graph.load(run.to_build)
            result = {"status": "finished"} | (graph.build("task") or {})
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            failure = _describe(error) | {"rank": rank, "seconds": time.time() - started}
            console.log_only(failure["traceback"])
        else:
            if rank == 0:
                run.write_result(result | {"seconds": time.time() - started})
            return 0 if result["status"] in GOOD_STATUSES else 1
    _report(run, failure, _debug(run))
    return 130 if failure["status"] == "interrupted" else 1


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Until the training loop looks after signals, SIGTERM ends a single rank as Ctrl-C does.

    One of several must die at once: it may be waiting for a rank that is dead.
    """
    alone = "WORLD_SIZE" not in os.environ
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(error: BaseException) -> dict[str, Any]:
    """Status and message: the graph's errors name the node, and keep what caused them."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    status = "failed"
    message = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        status, message = "interrupted", "asked to stop where nothing can be saved"
    elif any(isinstance(e, _memory_errors()) for e in chain):
        status = "out of memory"
    return {"status": status, "error": message, "traceback": traceback.format_exc()}


def _memory_errors() -> tuple[type[BaseException], ...]:
    torch = sys.modules.get("torch")
    return (MemoryError, torch.OutOfMemoryError) if torch is not None else (MemoryError,)


def _debug(run: RunDirectory) -> bool:
    try:
        return bool(Graph.load(run.resolved).build("debug"))
    except Exception:  # the configuration itself may be what is broken
        return False


def _report(run: RunDirectory, failure: dict[str, Any], debug: bool) -> None:
    if not debug:
        del failure["traceback"]
    try:
        first = run.write_error(failure)
    except OSError:  # a full disk may be what failed
        first = True
    if first and LAUNCHED not in os.environ:
        say(run, failure)


def say(run: RunDirectory, failure: dict[str, Any]) -> None:
    """The one message about a run that went wrong, on the console and in `result.json`."""
    text = failure.pop("traceback", None)
    run.write_result(failure)
    print(f"{failure['status']}: {failure['error']}", file=sys.stderr)
    if text:
        print(text.rstrip(), file=sys.stderr)
    print(f"more in {run}/logs", file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """Ends a rank. One of several does not wait for threads or process groups.

    When it failed they would wait for others; and on torch 2.15 gloo's threads may outlive the
    interpreter, which ends a rank that succeeded with a signal (pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def _die_with_parent() -> None:
    """On Linux, a launcher that is killed takes its ranks along."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    if LAUNCHED in os.environ:
        _die_with_parent()
        _rank = int(os.environ["RANK"])
        place_streams(RunDirectory(sys.argv[1]).logs / f"rank-{_rank}.log", show=_rank == 0)
    leave(main(sys.argv[1]))
