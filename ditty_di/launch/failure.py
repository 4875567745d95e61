"""Describe and report a failed run: the node, the training step, and the line that raised."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from ditty_di.config import BuildError, ConfigError, Graph
from ditty_di.io import read_text
from ditty_di.launch.rundir import RunDirectory
from ditty_di.messages import causes
from ditty_di.origins import is_installed

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_FILE = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)', re.M)
_WORKER = re.compile(r"^Caught \w+ in DataLoader worker process \d+\.\n", re.M)
#: Causes of a failure beside the names of exceptions; see `describe`.
CONFIGURATION, COMMUNICATION = "configuration", "communication"
# A constructor may raise these for what is over at the next try: a file system, a connection.
_PASSING = (OSError, EOFError, RuntimeError)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? (?P<pid>[\d, ]+)\)")


class Restarts:
    """Decide whether ranks that failed are started again, and say so in one line.

    What fails at every start is not repeated: an error of the configuration, or an exception that
    is raised again at the same step right after a restart.

    Args:
        allowed: number of restarts, 0 for none.

    Attributes:
        count: restarts so far.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed, self.count = allowed, 0
        self._last: tuple[str | None, int | None] | None = None

    def again(self, run: RunDirectory, failure: dict[str, Any]) -> bool:
        """Return whether to start again; otherwise the failure's message says why not.

        Args:
            run: the run, to say where it goes on from.
            failure: what happened.
        """
        if not self.allowed or failure["status"] == "interrupted":
            return False
        cause, happened = failure.get("cause"), (failure.get("cause"), failure.get("step"))
        if cause == CONFIGURATION:
            why = "it would fail again"
        elif cause not in (None, COMMUNICATION) and happened == self._last:
            why = "the same happened before the last restart"
        elif self.count >= self.allowed:
            why = f"launcher.max_restarts={self.allowed} is used up"
        else:
            self.count, self._last = self.count + 1, happened
            step, error = run.newest_step(), failure["error"].splitlines()[0]
            origin = "the start" if step is None else f"step {step}"
            line = f"restart {self.count} of {self.allowed}, from {origin}: {error}"
            print(line, file=sys.stderr, flush=True)
            return True
        between = "\n" if "\n" in failure["error"] else "; "
        failure["error"] += f"{between}not restarted: {why}"
        return False


def report(run: RunDirectory, failure: dict[str, Any]) -> int:
    """Write a failure to `result.json` and standard error; return the exit code.

    Args:
        run: the run that failed.
        failure: `status`, `error` and more; a `traceback` is printed and not written.
    """
    trace = failure.pop("traceback", None)
    run.write_result(failure)
    print(f"{failure['status']}: {failure['error']}", file=sys.stderr)
    if trace:
        print(trace.rstrip(), file=sys.stderr)
    print(f"more in {run}/logs", file=sys.stderr, flush=True)
    return exit_code(failure)


def exit_code(failure: dict[str, Any]) -> int:
    """Return the exit code of a failed run.

    Args:
        failure: with a `status`.
    """
    return 130 if failure["status"] == "interrupted" else 1


def oom_kills() -> int | None:
    """Return how many processes the kernel's out-of-memory killer has ended since boot.

    Counted for this machine and its containers (`/proc/vmstat`); None where that is not available.
    """
    found = re.search(r"^oom_kill (\d+)", read_text("/proc/vmstat"), re.M)
    return int(found[1]) if found else None


def how_killed(before: int | None) -> str:
    """Return the likely origin of a SIGKILL.

    Args:
        before: `oom_kills()` at the start of the run.
    """
    now = oom_kills()
    if before is None or now is None:
        return "SIGKILL: did the machine run out of memory?"
    if now > before:
        return "SIGKILL: the kernel ran out of memory"
    return "SIGKILL, and not by the kernel for want of memory"


def describe(error: BaseException, graph: Graph | None, rank: int, kills: str) -> dict[str, Any]:
    """Return `status`, `error` (one message), `traceback`, `cause`, and if known `step`, `node`.

    The cause is "configuration" for what fails at every start, or the name of the exception.

    Args:
        error: what the task raised; errors of the graph name the node, and keep their cause.
        graph: what was built, to find the node whose object raised.
        rank: this rank; named when there are several.
        kills: `how_killed(...)`.
    """
    chain = list(causes(error))
    failure: dict[str, Any] = {"status": "failed", "traceback": traceback.format_exc()}
    if isinstance(error, KeyboardInterrupt):
        return failure | {"status": "interrupted", "error": str(error) or "Ctrl-C"}
    torch = sys.modules.get("torch")
    memory_errors = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    if any(isinstance(e, memory_errors) for e in chain):
        failure["status"] = "out of memory"
    where = [f"rank {rank}"] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    step = next((s for e in chain if (s := getattr(e, "training_step", None)) is not None), None)
    if step:
        failure["step"] = step
        where.append(f"step {step}")
    raised = error.__cause__ if isinstance(error, BuildError) else None
    if isinstance(error, BuildError) and raised and error.problems[0].key == "task":
        # Everything was built: the line of the task in a configuration file explains nothing.
        failure["node"] = _node(raised, graph) or "task"
        message = f"{failure['node']}: {_message(raised, kills)}"
    elif isinstance(error, ConfigError):
        message = str(error)
    else:
        message = _message(error, kills)
    failure["cause"] = _cause(error)
    return failure | {"error": ": ".join(filter(None, (", ".join(where), message)))}


def _cause(error: BaseException) -> str:
    raised = error.__cause__ if isinstance(error, BuildError) else None
    if raised is None:
        return CONFIGURATION if isinstance(error, ConfigError) else type(error).__name__
    in_task = isinstance(error, BuildError) and error.problems[0].key == "task"
    if isinstance(raised, ConfigError) or not (in_task or isinstance(raised, _PASSING)):
        return CONFIGURATION
    return type(raised).__name__


def _message(error: BaseException, kills: str) -> str:
    """Return `Type: text (file:line)`, with the innermost line of the user's own code."""
    frames = traceback.walk_tb(error.__traceback__)
    at = _own_line((frame.f_code.co_filename, line) for frame, line in frames)
    text = f"{type(error).__name__}: {error}"
    if _WORKER.match(str(error)):  # an exception of a data loader worker arrives as text
        at = _own_line((m["file"], int(m["line"])) for m in _FILE.finditer(text)) or at
        text = text.rstrip().splitlines()[-1]
    elif dead := _DEAD_WORKER.search(text):
        ended = f"data loader worker with pid {dead['pid']} ended"
        text = f"{type(error).__name__}: {ended}: {' '.join(str(error).split())}"
        if "Killed" in text:
            text += f" ({kills})"
    return f"{text}{at and f' ({at})'}"


def _own_line(lines: Iterable[tuple[str, int]]) -> str:
    """Return `file:line` of the last line in the user's own code, "" without any."""
    own = [(file, line) for file, line in lines if is_own(file)]
    return f"{relative(own[-1][0])}:{own[-1][1]}" if own else ""


def is_own(file: str) -> bool:
    """Return whether a file is the user's own: not of Python, an installed package, or this one.

    Args:
        file: absolute path of a source file.
    """
    own = not (file.startswith(("<", _PACKAGE)) or is_installed(file))
    return own and "site-packages" not in file


def relative(file: str) -> str:
    """Return a path as it can be typed in the working folder.

    Args:
        file: absolute path.
    """
    return file.removeprefix(os.getcwd() + os.sep)


def _node(error: BaseException, graph: Graph | None) -> str | None:
    """Return the key of the node whose object's code raised: the innermost one on the stack."""
    objects: dict[int, str] = {}
    codes: dict[Any, str] = {}
    for key, made in (graph.built() if graph else {}).items():
        function = made.func if isinstance(made, functools.partial) else made
        if (code := getattr(function, "__code__", None)) is not None:
            codes.setdefault(code, key)
        elif not isinstance(made, str | int | float | bool | None):
            objects.setdefault(id(made), key)
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        found = objects.get(id(_first_argument(frame))) or codes.get(frame.f_code)
        if found is not None:
            return found
    return None


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
