"""Several hosts on this machine: network namespaces on a bridge, each with a host name of its own.

They share the file system and the processor; what one is killed of, the others notice as they would
notice another machine. Making them needs root, `ip` and `unshare`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import pytest

from tests.toy import REPOSITORY


def _ip(*arguments: object) -> str:
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout


class Hosts:
    """Hosts `host0`, `host1`, ... with the addresses 10.213.77.1, ... while the context is open."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        self._tag = f"ditty{os.getpid()}"
        self.names = [f"{self._tag}-{n}" for n in range(count)]
        self._switch = f"{self._tag}-net"

    def __enter__(self) -> Hosts:
        try:
            for name in (self._switch, *self.names):
                _ip("netns", "add", name)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for n, name in enumerate(self.names):
                peer = ("type", "veth", "peer", "name", f"port{n}", "netns", self._switch)
                _ip("link", "add", "net0", "netns", name, *peer)
                _ip("-n", self._switch, "link", "set", f"port{n}", "master", "bridge", "up")
                _ip("-n", name, "addr", "add", f"{self.address(n)}/24", "dev", "net0")
                self.link(n, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for n, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(n)
                _ip("netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self._switch)

    def address(self, n: int) -> str:
        return f"10.213.77.{n + 1}"

    def start(self, n: int, *arguments: str) -> subprocess.Popen:
        """`python -m ditty_di ARGUMENTS` on a host; its output goes to `host<n>.log`."""
        script = f'hostname host{n}; exec "$@"'
        command = ["ip", "netns", "exec", self.names[n], "unshare", "--uts"]
        command += ["sh", "-c", script, "sh", sys.executable, "-m", "ditty_di", *arguments]
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        with (self.folder / f"host{n}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, n: int) -> str:
        return (self.folder / f"host{n}.log").read_text(errors="replace")

    def pids(self, n: int) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.names[n]).split()]

    def kill(self, n: int) -> None:
        """Kill all processes of a host at once, as a power cut does; its network stays."""
        for pid in self.pids(n):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def link(self, n: int, state: str) -> None:
        """Set the network of a host `up` or `down`."""
        _ip("-n", self.names[n], "link", "set", "net0", state)


def possible() -> bool:
    """Whether hosts can be made here."""
    if sys.platform != "linux" or os.geteuid() or not all(map(shutil.which, ("ip", "unshare"))):
        return False
    try:
        with Hosts(1, Path()):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="makes network namespaces"
)
