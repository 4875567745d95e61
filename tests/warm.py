"""Python programs and commands in processes forked from a server that has imported torch and more.

`run([...])` is `subprocess.run([sys.executable, ...])` without the seconds of imports. Modules are
imported already: what reads the environment when it is imported (HF_HOME, ...) needs a fresh
interpreter instead, and so does a test of starting itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ditty_di.launch import processes
from ditty_di.sweeps.warm import ARROW_WITHOUT_THREAD

ROOT = Path(__file__).parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(*ARROW_WITHOUT_THREAD)
#: A test process has one server and one list of modules: who forks takes it from here.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *("tests.checkpoint.cases", "ditty_di.training.trainer", "ditty_di.sweeps.warm_imports"),
        *("ditty_di.tasks.generate", "ditty_di.tasks.evaluate", "ditty_di.tasks.export"),
        *("ditty_di.models.pretrained", "ditty_di.api", "ditty_di.diffusion", "datasets"),
    ]
)


class Forked:
    """`python ARGUMENTS` in a forked process, with the interface of `subprocess.Popen`.

    Arguments are `-m module ...`, `-c code ...` or `script.py ...`, and `-P` before them. Output
    goes to `log`, or is returned by `communicate`. With `fork_ranks` the ranks that a command
    starts are forked from it: only where nothing is killed.
    """

    def __init__(
        self,
        arguments: Sequence[Any],
        cwd: str | os.PathLike,
        env: Mapping[str, str],
        log: Path | None = None,
        fork_ranks: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [log or Path(self._folder.name) / name for name in ("out", "err")]
        folder = Path(cwd).absolute()
        args = ([*map(str, arguments)], folder, dict(env), self._streams, fork_ranks)
        self._process = context.Process(target=_become, args=args)
        # Otherwise the child would import the test process's __main__.
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
        self.args, self.pid = args[0], self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text(errors="replace") for file in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[Any],
    *,
    cwd: str | os.PathLike = ".",
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` to its end."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    everything = {**os.environ, **own, **(env or {})}
    return _finish([Forked(arguments, cwd, everything, fork_ranks=True)], timeout)[0]


def ditty_di(folder: str | os.PathLike, *arguments: Any) -> str:
    """Run a command line that has to succeed in a folder, and return what it printed."""
    done = run(["-m", "ditty_di", *arguments], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ranks(
    arguments: Sequence[Any],
    count: int = 2,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> list[str]:
    """Run a program on `count` ranks that have to succeed; return what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layout = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **layout, **(env or {})}
    started = [
        Forked(arguments, ROOT, {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    done = _finish(started, timeout)
    report = "\n".join(f"--- rank {n}\n{d.stdout}{d.stderr}" for n, d in enumerate(done))
    assert [d.returncode for d in done] == [0] * count, report
    return [d.stdout for d in done]


def _finish(started: Sequence[Forked], timeout: float) -> list[subprocess.CompletedProcess]:
    """Wait for all; when one fails, the others, which may wait for it, get two seconds."""
    end = time.monotonic() + timeout
    while None in (codes := [process.poll() for process in started]) and time.monotonic() < end:
        if any(codes):
            end = min(end, time.monotonic() + 2)
        time.sleep(0.02)
    for process in started:
        process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.wait(30), *process.communicate())
        for process in started
    ]


class _Rank:
    """A rank that is forked from the command that starts it, with the interface of `Popen`."""

    def __init__(self, args: list[str], env: dict[str, str], **options: Any) -> None:
        self.args, self.returncode = args, None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code: Any = 1
            try:
                os.setsid()
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
                    if isinstance(file := options[name], int):
                        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
                    elif file is not None:
                        os.dup2(file.fileno(), descriptor)
                _execute(args[1:], env)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, options))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _popen(args: list[str], **options: Any) -> Any:
    own = [sys.executable, "-m", "ditty_di.launch"]
    return (_Rank if args[:3] == own else subprocess.Popen)(args, **options)


def _become(
    arguments: list[str], cwd: Path, env: dict[str, str], streams: list[Path], fork_ranks: bool
) -> None:
    """Run the program in this process, as `python` would."""
    for descriptor, file in enumerate(streams, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    if fork_ranks:
        processes.subprocess = SimpleNamespace(Popen=_popen)  # type: ignore[assignment]
    _execute(arguments, env)


def _execute(arguments: list[str], env: dict[str, str]) -> None:
    cwd = Path.cwd()
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # the server may have looked it up
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if arguments[0] == "-P":
        del arguments[0]
    else:
        script = arguments[0][0] != "-"
        sys.path.insert(0, str(Path(arguments[0]).parent) if script else str(cwd))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
