"""Find the rank that did not reach a collective, and report where it was.

Each rank registers a handler (`faulthandler`) that writes its Python stack to its log on SIGUSR1;
it answers from native code too. A rank whose collective timed out asks the others of its machine,
and those of other machines by touching a file in the run directory that a thread of theirs watches.
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

from ditty_di.io import read_text
from ditty_di.launch.failure import is_own, relative
from ditty_di.launch.processes import repeating
from ditty_di.launch.rundir import RunDirectory
from ditty_di.messages import causes

_TIMEOUT = re.compile(r"(?i)timed ?out|timeout")
_MILLISECONDS = re.compile(r"(?i)(?:waiting|after|ran for) (\d+) ?(?:ms|milliseconds)")
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.M)
_CURRENT = "Current thread"
_COLLECTIVES = os.path.join("torch", "distributed") + os.sep
_WRAPPERS = ("wrapper", "wait", "synchronize", "__call__")
_WAITING_FOR_A_CHILD = ("selectors.py", "connection.py", "queues.py", "queue.py")
_ANSWER_SECONDS = 2.0
_WATCH_SECONDS = 1.0
_REMOTE_ANSWER_SECONDS = 5.0  # on a shared file system a change is seen late
_REPORTING = ("ditty_di/launch/hang.py", "ditty_di/launch/failure.py")

Stack = list[tuple[str, int, str]]  # file, line, function; the innermost first


@contextmanager
def stacks_on_signal(log: TextIO) -> Iterator[None]:
    """Write the stacks of all threads to a log on SIGUSR1, and on a crash in native code.

    Args:
        log: an open file; crashes go there unless `faulthandler` is enabled already.
    """
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


@contextmanager
def stacks_on_request(run: RunDirectory) -> Iterator[None]:
    """Write this rank's stacks to its log when a rank on another machine asks for them.

    Args:
        run: the run, which all machines see.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        yield  # every rank is on this machine
        return
    request = _request(run)
    seen = _changed_at(request)

    def look() -> None:
        nonlocal seen
        if (now := _changed_at(request)) != seen:
            seen = now
            os.kill(os.getpid(), signal.SIGUSR1)

    with repeating(look, _WATCH_SECONDS):  # no longer: without a handler it would end the process
        yield


def _request(run: RunDirectory) -> Path:
    return run.logs / ".stacks-wanted"


def _changed_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def is_communication(error: BaseException) -> bool:
    """Return whether an error was raised in a collective, as it is when another rank has ended.

    Args:
        error: what a rank raised.
    """
    failed = any(isinstance(one, RuntimeError) for one in causes(error))
    return failed and _collective(error) is not None


def diagnose(error: BaseException, run: RunDirectory, rank: int) -> dict[str, Any]:
    """Return a description of the ranks that did not reach a collective, {} for another error.

    Args:
        error: what this rank raised.
        run: the run, whose lock file lists the ranks' processes.
        rank: this rank.

    Returns:
        `error` says which ranks waited in which collective for how long, and where the others were;
        `hanging` lists the others, `pids` those of them that can be killed from here.
    """
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    collective = _collective(error) if _TIMEOUT.search(text) else None
    if collective is None:
        return {}
    time.sleep(0.5)  # ranks that waited as long are failing now
    failed = {rank, *(entry["rank"] for entry in run.errors())}
    hanging: dict[int, str] = {}
    waiting: dict[int, str] = {}
    pids: list[int] = []
    asked = [
        (int(holder["role"].removeprefix("rank ")), holder)
        for holder in run.holders()
        if holder["role"].startswith("rank ")
    ]
    asked = [(number, holder) for number, holder in asked if number not in failed]
    remote = _ask_other_machines(run, [n for n, h in asked if h["host"] != platform.node()])
    for number, holder in asked:
        here, host = number not in remote, holder["host"]
        stack = _stack_of(holder["pid"], _log(run, number)) if here else remote[number]
        if any(file.endswith(_REPORTING) for file, _, _ in stack):
            continue
        if stack and _COLLECTIVES in stack[0][0]:
            waiting[number] = f"was in {stack[0][2]}{_own_line(stack)}"
        else:
            hanging[number] = f"{'' if here else f'on {host} '}{_position(stack)}"
            pids += [holder["pid"]] if here else []
    others = hanging or waiting
    if not others:
        return {}
    milliseconds = _MILLISECONDS.search(text)
    since = f" since {int(milliseconds[1]) / 1000:g} s" if milliseconds else ""
    if hanging:
        names = ", ".join(f"rank {number}" for number in sorted(hanging))
        message = f"{names} did not reach the {collective} that rank {rank} waited for{since}"
    else:
        message = f"rank {rank} waited in {collective}{since} while others did something else"
    positions = "; ".join(f"rank {number} {text}" for number, text in sorted(others.items()))
    return {"error": f"{message}; {positions}", "hanging": sorted(others), "pids": pids}


def _collective(error: BaseException) -> str | None:
    """Return the innermost function of torch.distributed on the stacks of an error's chain."""
    frames = (frame for one in causes(error) for frame, _ in traceback.walk_tb(one.__traceback__))
    codes = [frame.f_code for frame in frames if _COLLECTIVES in frame.f_code.co_filename]
    called = [code.co_name for code in codes if code.co_name not in _WRAPPERS]
    return called[-1] if called else None


def _stack_of(pid: int, log: Path) -> Stack:
    """Return the main thread's stack of a process, [] when it does not answer.

    For a rank that waits for a data loader worker it is the worker's stack.
    """
    stack = _ask(pid, log)
    if stack and stack[0][0].endswith(_WAITING_FOR_A_CHILD):
        for child in read_text(f"/proc/{pid}/task/{pid}/children").split():
            inner = _ask(int(child), log)
            if any(is_own(file) for file, _, _ in inner):
                return inner
    return stack


def _ask_other_machines(run: RunDirectory, ranks: list[int]) -> dict[int, Stack]:
    """Return the stacks of ranks on other machines, [] for one that does not answer."""
    if not ranks:
        return {}
    begin = {rank: _size(_log(run, rank)) for rank in ranks}
    deadline = time.monotonic() + _REMOTE_ANSWER_SECONDS
    _request(run).touch()
    return {rank: _appended(_log(run, rank), begin[rank], deadline) for rank in ranks}


def _ask(pid: int, log: Path) -> Stack:
    """Send SIGUSR1 and read the stack that the process appends to its log."""
    if not _handles_usr1(pid):
        return []
    begin = _size(log)
    try:
        os.kill(pid, signal.SIGUSR1)
    except OSError:
        return []
    return _appended(log, begin, time.monotonic() + _ANSWER_SECONDS)


def _log(run: RunDirectory, rank: int) -> Path:
    return run.logs / f"rank-{rank}.log"


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _appended(log: Path, begin: int, deadline: float) -> Stack:
    """Return the main thread's stack that is appended to a log, [] if none is in time."""
    text = ""
    while time.monotonic() < deadline:
        time.sleep(0.1)
        with log.open("rb") as file:
            file.seek(begin)
            appended = file.read().decode(errors="replace")
        if _CURRENT in appended and appended == text:  # complete
            break
        text = appended
    current = text.partition(_CURRENT)[2].partition("\n\n")[0].partition("\nThread ")[0]
    return [(m["file"], int(m["line"]), m["function"]) for m in _FRAME.finditer(current)]


def _handles_usr1(pid: int) -> bool:
    """Return whether SIGUSR1 is handled, which would kill otherwise. Assumed off Linux."""
    status = read_text(f"/proc/{pid}/status")
    if not status:
        return not Path("/proc/self/status").exists()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.M)
    return bool(caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def _position(stack: Stack) -> str:
    if not stack:
        return "does not answer (stopped?)"
    own = [entry for entry in stack if is_own(entry[0])] or stack
    file, line, function = own[0]
    return f"was in {Path(file).stem}.{function} ({relative(file)}:{line})"


def _own_line(stack: Stack) -> str:
    own = [entry for entry in stack if is_own(entry[0])]
    return f" ({relative(own[0][0])}:{own[0][1]})" if own else ""
