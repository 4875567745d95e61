"""Python programs in processes forked from one that has imported torch and the trainer.

`run([...])` is `subprocess.run([sys.executable, ...])` without the seconds of imports: the forked
process gets its own arguments, folder, environment and output, and runs the program as `__main__`.
Modules are imported already, without access to the hub: whatever reads the environment when it is
imported (HF_HOME, ...) needs a fresh interpreter instead.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
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
from typing import Any

ROOT = Path(__file__).parents[1]
#: Imported before the first fork. None of them starts a thread.
MODULES = (
    *(
        "ditty_di.cli.composing",
        "ditty_di.cli.job",
        "ditty_di.launch.worker",
        "ditty_di.training.trainer",
    ),
    *("ditty_di.tasks.generate", "ditty_di.tasks.evaluate", "ditty_di.tasks.export"),
    *("ditty_di.data", "ditty_di.models.pretrained", "ditty_di.export", "ditty_di.front"),
    *("datasets", "peft", "transformers.models.llama.modeling_llama"),
)


class Process:
    """A forked program; its output goes to files in `folder`."""

    def __init__(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self.arguments = list(map(str, arguments))
        request = {"folder": str(self.folder), "arguments": self.arguments, "cwd": str(cwd)}
        server = _server()
        server.stdin.write(json.dumps(request | {"env": dict(env)}) + "\n")
        server.stdin.flush()

    def poll(self) -> int | None:
        """Return the exit code, or None while the program runs."""
        code = self.folder / "code"
        return int(code.read_text()) if code.exists() else None

    def wait(self, timeout: float = 300.0) -> subprocess.CompletedProcess:
        """Wait for the end; after `timeout` seconds the program is killed and an error raised."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if _server().poll() is not None:
                raise RuntimeError("the process that programs are forked from has died")
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.arguments, timeout, self._read("stdout"))
            time.sleep(0.02)
        out, err = self._read("stdout"), self._read("stderr")
        return subprocess.CompletedProcess(self.arguments, code, out, err)

    def kill(self) -> None:
        """Kill the program and the processes of its session."""
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int((self.folder / "pid").read_text()), signal.SIGKILL)

    def _read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text(errors="replace") if file.exists() else ""


def run(
    arguments: Sequence[Any],
    *,
    cwd: str | os.PathLike = ".",
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` (`-m module ...`, `-c code ...` or `script.py ...`) to its end."""
    return Process(arguments, Path(cwd).absolute(), env or os.environ).wait(timeout)


def ditty_di(folder: str | os.PathLike, *arguments: Any) -> str:
    """Run a command line that has to succeed in a folder, and return what it printed."""
    done = run(
        ["-m", "ditty_di", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ranks(
    arguments: Sequence[Any],
    count: int = 2,
    *,
    cwd: str | os.PathLike = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> list[subprocess.CompletedProcess]:
    """Run a program on `count` ranks, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = dict(env or os.environ) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    started = [
        Process(arguments, Path(cwd), base | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    end = time.monotonic() + timeout
    try:
        while None in (codes := [process.poll() for process in started]):
            if any(codes) or time.monotonic() > end:  # the others may wait for it forever
                time.sleep(2)
                break
            time.sleep(0.02)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return [process.wait(30) for process in started]


@functools.cache
def _server() -> subprocess.Popen:
    # Its standard error is a file: pytest closes what it captures.
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=tempfile.TemporaryFile(),  # noqa: SIM115
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    atexit.register(server.kill)
    return server


def _serve() -> None:
    """Fork a program for each line of standard input; the loop of the server."""
    import importlib

    for module in MODULES:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        if os.fork() == 0:
            _keep(json.loads(line))


def _keep(request: dict[str, Any]) -> None:
    """Fork the program and write down how it ended: the parent of one program."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder = Path(request["folder"])
    pid = os.fork()
    if pid == 0:
        _become(request)
    (folder / "pid").write_text(str(pid))
    _, status = os.waitpid(pid, 0)
    (folder / "code.part").write_text(str(os.waitstatus_to_exitcode(status)))
    (folder / "code.part").rename(folder / "code")
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Run the program of a request in this process, as `python` would."""
    os.setsid()
    folder = Path(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = open(0)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [p for p in request["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
    code = 1
    try:
        code = _program(request["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        os._exit(code)


def _program(arguments: list[str]) -> int:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, os.getcwd())
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    _serve()
