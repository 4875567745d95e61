"""What a rank runs: `python -m ditty_di.worker RUN_DIR` builds the task of a resolved config.

Imports no Hydra, and torch only when a node needs it. Nothing here talks to other ranks, least of
all when something failed: whoever waits for a dead rank waits for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditty_di import hang, parent_death, stop_signals
from ditty_di.config import Graph
from ditty_di.console import LAUNCHED, Console, quiet_imports
from ditty_di.failure import describe
from ditty_di.memory_kills import how_killed, kills_so_far
from ditty_di.rundir import GOOD_STATUSES, RunDirectory


def main(run_dir: str | Path) -> int:
    """Runs the task; the exit code is 0 when it finished or was stopped in good order.

    The task's dict, with `status` and `seconds` added, becomes `result.json` (rank 0 writes it).
    A failing rank leaves its traceback in `logs/rank-N.log` and its message in
    `logs/error-rank-N.json`; the first one to fail also says it, and writes `result.json`.
    """
    run = RunDirectory(run_dir)
    rank = int(os.environ.get("RANK", "0"))
    started, kills = time.time(), kills_so_far()
    quiet_imports()
    log = run.logs / f"rank-{rank}.log"
    graph: Graph | None = None
    with _early_signals() as signals:
        with Console(log, show=rank == 0) as console, hang.stacks_on_signal(console.log):
            try:
                run.join(rank)
                graph = Graph.load(run.to_build)
                result = {"status": "finished"} | (graph.build("task") or {})
                signals.ask = signals.insist = _too_late
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                signals.ask = signals.insist = _too_late
                failure = describe(error, graph, rank, how_killed(kills))
                failure |= {"rank": rank, "seconds": time.time() - started}
                console.log_only(failure["traceback"])
                if failure["status"] == "interrupted":
                    failure["error"] += goes_on(run)
                else:
                    found = hang.diagnose(error, run, rank)
                    if found and "step" in failure:
                        found["error"] = f"step {failure['step']}: {found['error']}"
                    failure |= found
            else:
                if rank == 0:
                    run.write_result(result | {"seconds": time.time() - started})
                run.release()
                return 0 if result["status"] in GOOD_STATUSES else 1
        _report(run, failure, _debug(run))
    return exit_code(failure)


@contextmanager
def _early_signals() -> Iterator[stop_signals.StopSignals]:
    """Until the training loop looks after signals, one ends a single rank as Ctrl-C does.

    One of several ends at once, by the signal: it may be waiting in native code for another.
    """

    def interrupt(number: signal.Signals) -> None:
        raise KeyboardInterrupt(f"{number.name} outside the training loop")

    signals = stop_signals.StopSignals(interrupt)
    if "WORLD_SIZE" not in os.environ:
        signals.install()
    try:
        yield signals
    finally:
        signals.restore()


def _too_late(*number: signal.Signals) -> None:
    """The task is over: what is left to do is to say how it went."""


def goes_on(run: RunDirectory) -> str:
    """Where a run starts when it goes on, to be added to a message."""
    step = run.newest_step()
    return "; no checkpoint exists" if step is None else f"; the run goes on from step {step}"


def interrupted(run: RunDirectory, how: str) -> dict[str, Any]:
    return {"status": "interrupted", "error": how + goes_on(run)}


def exit_code(failure: dict[str, Any]) -> int:
    return 130 if failure["status"] == "interrupted" else 1


def _debug(run: RunDirectory) -> bool:
    try:
        return bool(Graph.load(run.to_build).build("debug"))
    except Exception:  # the configuration itself may be what is broken
        return False


def _report(run: RunDirectory, failure: dict[str, Any], debug: bool) -> None:
    if not debug:
        del failure["traceback"]
    hanging = failure.pop("pids", ())
    try:
        first = run.write_error(failure)
    except OSError:  # a full disk may be what failed
        first = True
    if first and LAUNCHED not in os.environ:
        say(run, failure)
    run.release()
    for pid in hanging:  # nothing else would end them before another timeout
        os.kill(pid, signal.SIGKILL)


def say(run: RunDirectory, failure: dict[str, Any]) -> None:
    """The one message about a run that went wrong, on the console and in `result.json`."""
    text = failure.pop("traceback", None)
    run.write_result(failure)
    print(f"{failure['status']}: {failure['error']}", file=sys.stderr)
    if text:
        print(text.rstrip(), file=sys.stderr)
    print(f"more in {run}/logs", file=sys.stderr, flush=True)


def own_process() -> None:
    """To be called first in a process that only runs a job: it ends with its parent, and its data
    loader workers with it; once asked to stop it is not killed by being asked again."""
    parent_death.follow_parent()
    parent_death.take_forks_along()
    stop_signals.ends_with_job = True


def leave(code: int) -> None:
    """Ends a rank. One of several does not wait for threads or process groups.

    When it failed they would wait for others; and on torch 2.15 gloo's threads may outlive the
    interpreter, which ends a rank that succeeded with a signal (pytorch#179291).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the terminal, or who read the pipe, is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    own_process()
    leave(main(sys.argv[1]))
