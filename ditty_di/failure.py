"""Describe an exception of a run: the node, the training step, and the line it came from."""

from __future__ import annotations

import functools
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

from ditty_di.config import BuildError, ConfigError, Graph

_PACKAGE = str(Path(__file__).parent) + os.sep
_INSTALLED = tuple(
    str(Path(sysconfig.get_path(name))) + os.sep for name in ("stdlib", "purelib", "platlib")
)
_FILE = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)', re.M)
_WORKER = re.compile(r"^Caught \w+ in DataLoader worker process \d+\.\n", re.M)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? (?P<pid>[\d, ]+)\)")


def describe(error: BaseException, graph: Graph | None, rank: int, kills: str) -> dict[str, Any]:
    """Return `status`, `error` (one message), `traceback`, and where they are known `step`, `node`.

    Args:
        error: what the task raised; errors of the graph name the node, and keep their cause.
        graph: what was built, to find the node whose object raised.
        rank: this rank; named when there are several.
        kills: what is known of a SIGKILL (`ditty_di.memory_kills`).
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    failure: dict[str, Any] = {"status": "failed", "traceback": traceback.format_exc()}
    if isinstance(error, KeyboardInterrupt):
        return failure | {"status": "interrupted", "error": str(error) or "Ctrl-C"}
    if any(isinstance(e, _memory_errors()) for e in chain):
        failure["status"] = "out of memory"
    step = next((s for e in chain if (s := getattr(e, "training_step", None)) is not None), None)
    if step:
        failure["step"] = step
    ranks = [f"rank {rank}"] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    at = ", ".join(ranks + [f"step {step}"] * bool(step))
    raised = error.__cause__ if isinstance(error, BuildError) else None
    if isinstance(error, BuildError) and raised and error.problems[0].key == "task":
        # Everything was built: the line of the task in a configuration file says nothing.
        failure["node"] = _node(raised, graph) or "task"
        message = f"{failure['node']}: {_message(raised, kills)}"
    elif isinstance(error, ConfigError):
        message = str(error)
    else:
        message = _message(error, kills)
    return failure | {"error": ": ".join(filter(None, (at, message)))}


def _message(error: BaseException, kills: str) -> str:
    """`Type: text (file:line)`, the innermost line that is the user's own."""
    text, place = str(error), own_line(_lines(error.__traceback__))
    kind = type(error).__name__
    if _WORKER.match(text):  # a data loader worker's exception arrives as text
        in_worker = own_line((m["file"], int(m["line"])) for m in _FILE.finditer(text))
        lines = text.rstrip().splitlines()
        place = in_worker or place
        return f"{lines[-1]}{place and f' ({place})'}"
    if dead := _DEAD_WORKER.search(text):
        text = f"data loader worker with pid {dead['pid']} ended: {' '.join(text.split())}"
        if "Killed" in text:
            text += f" ({kills})"
    return f"{kind}: {text}{place and f' ({place})'}"


def _lines(trace: TracebackType | None) -> Iterator[tuple[str, int]]:
    for frame, line in traceback.walk_tb(trace):
        yield frame.f_code.co_filename, line


def own_line(lines: Any) -> str:
    """Return `file:line` of the last line that belongs neither to Python, nor to an installed
    package, nor to this one; "" without any."""
    own = [(file, line) for file, line in lines if is_own(file)]
    return f"{short(own[-1][0])}:{own[-1][1]}" if own else ""


def is_own(file: str) -> bool:
    return not file.startswith(("<", _PACKAGE, *_INSTALLED)) and "site-packages" not in file


def short(file: str) -> str:
    """A path as it can be typed from the working folder."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here)


def _node(error: BaseException, graph: Graph | None) -> str | None:
    """The key of the node whose object's code raised: the innermost one on the stack."""
    if graph is None:
        return None
    objects: dict[int, str] = {}
    codes: dict[CodeType, str] = {}
    for key, made in graph.built().items():
        function = made.func if isinstance(made, functools.partial) else made
        if isinstance(code := getattr(function, "__code__", None), CodeType):
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


def _memory_errors() -> tuple[type[BaseException], ...]:
    torch = sys.modules.get("torch")
    return (MemoryError, torch.OutOfMemoryError) if torch is not None else (MemoryError,)
