"""Find the rank that did not come to a collective, and report where it was.

Each rank registers a handler (`faulthandler`) that writes its Python stack to its log on SIGUSR1;
it answers from native code too. A rank whose collective timed out asks the others of its machine.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import re
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ditty_di.failure import is_own, short
from ditty_di.rundir import RunDirectory

_TIMEOUT = re.compile(r"(?i)timed ?out|timeout")
_MILLISECONDS = re.compile(r"(?i)(?:waiting|after|ran for) (\d+) ?(?:ms|milliseconds)")
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.M)
_CURRENT = "Current thread"
_COLLECTIVES = os.path.join("torch", "distributed") + os.sep
_ANSWER_SECONDS = 2.0
_OWN_WORK = ("ditty_di/hang.py", "ditty_di/failure.py")


@contextmanager
def stacks_on_signal(log: TextIO) -> Iterator[None]:
    """Inside, SIGUSR1 writes the stacks of all threads to `log`, and so does a crash in native
    code (unless that has been arranged otherwise)."""
    if not hasattr(faulthandler, "register"):  # Windows
        yield
        return
    crashes = not faulthandler.is_enabled()
    if crashes:
        faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        if crashes:
            faulthandler.disable()


def diagnose(error: BaseException, run: RunDirectory, rank: int) -> dict[str, Any]:
    """Return the message about ranks that did not reach a collective, {} for another error.

    Returns:
        error: who waited in what for how long, and where the others were.
        hanging: their ranks; `pids`: those of them that can be ended from here.
    """
    collective = _collective(error)
    if collective is None:
        return {}
    time.sleep(0.5)  # ranks that waited as long are failing now
    seconds = _MILLISECONDS.search(_text(error))
    since = f" since {int(seconds[1]) / 1000:g} s" if seconds else ""
    failed = {entry["rank"] for entry in run.errors()}
    hanging: dict[int, str] = {}
    waiting: dict[int, str] = {}
    pids: list[int] = []
    for holder in run.holders():
        role, _, number = holder["role"].partition(" ")
        if role != "rank" or int(number) == rank or int(number) in failed:
            continue
        if holder["host"] != platform.node():
            hanging[int(number)] = f"is on {holder['host']}: see its log there"
            continue
        stack = _stack_of(holder["pid"], run.logs / f"rank-{number}.log")
        if stack and any(file.endswith(_OWN_WORK) for file, _, _ in stack):
            continue
        if stack and _COLLECTIVES in stack[0][0]:
            waiting[int(number)] = f"was in {stack[0][2]}{_called_from(stack)}"
        else:
            hanging[int(number)] = _where(stack)
            pids.append(holder["pid"])
    others = hanging or waiting
    if not others:
        return {}
    names = [f"rank {number}" for number in sorted(others)]
    told = "; ".join(f"rank {number} {text}" for number, text in sorted(others.items()))
    if hanging:
        message = (
            f"{', '.join(names)} did not reach the {collective} that rank {rank} waited for{since}"
        )
    else:
        message = f"rank {rank} waited in {collective}{since} while others did something else"
    return {"error": f"{message}; {told}", "hanging": sorted(others), "pids": pids}


def _collective(error: BaseException) -> str | None:
    """The function of torch.distributed in which the error's timeout ran out."""
    if not _TIMEOUT.search(_text(error)):
        return None
    chain: BaseException | None = error
    names: list[str] = []
    while chain is not None:
        for frame, _ in traceback.walk_tb(chain.__traceback__):
            if _COLLECTIVES in frame.f_code.co_filename:
                names.append(frame.f_code.co_name)
        chain = chain.__cause__ or chain.__context__
    called = [name for name in names if name not in ("wrapper", "wait", "synchronize", "__call__")]
    return called[-1] if called else None


def _text(error: BaseException) -> str:
    return f"{error} {error.__cause__ or ''} {error.__context__ or ''}"


Stack = list[tuple[str, int, str]]  # file, line, function; the innermost first


def _stack_of(pid: int, log: Path) -> Stack | None:
    """The main thread's stack of a process, None when it does not answer.

    A rank that waits for a data loader worker gives the worker's stack.
    """
    stack = _ask(pid, log)
    if stack and stack[0][0].endswith(("selectors.py", "connection.py", "queues.py", "queue.py")):
        for child in _children(pid):
            inner = _ask(child, log)
            if inner and any(is_own(file) for file, _, _ in inner):
                return inner
    return stack


def _ask(pid: int, log: Path) -> Stack | None:
    if not _answers(pid):
        return None
    begin = log.stat().st_size if log.exists() else 0
    try:
        os.kill(pid, signal.SIGUSR1)
    except OSError:
        return None
    deadline = time.monotonic() + _ANSWER_SECONDS
    text = ""
    while time.monotonic() < deadline:
        time.sleep(0.1)
        with log.open("rb") as file:
            file.seek(begin)
            said = file.read().decode(errors="replace")
        if _CURRENT in said and said == text:  # complete
            break
        text = said
    _, _, current = text.partition(_CURRENT)
    current = current.partition("\n\n")[0].partition("\nThread ")[0]
    found = _FRAME.finditer(current)
    return [(m["file"], int(m["line"]), m["function"]) for m in found] or None


def _answers(pid: int) -> bool:
    """Whether SIGUSR1 is handled: elsewhere it would kill. Known on Linux, else assumed."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return not Path("/proc/self/status").exists()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.M)
    return bool(caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _where(stack: Stack | None) -> str:
    if not stack:
        return "does not answer (stopped?)"
    own = [entry for entry in stack if is_own(entry[0])] or stack
    file, line, function = own[0]
    return f"was in {Path(file).stem}.{function} ({short(file)}:{line})"


def _called_from(stack: Stack) -> str:
    own = [entry for entry in stack if is_own(entry[0])]
    return f" ({short(own[0][0])}:{own[0][1]})" if own else ""
