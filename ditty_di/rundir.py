"""The run directory: what a run knows about itself, and how it ended."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

#: Statuses of `result.json` after which nothing is wrong.
GOOD_STATUSES = ("finished", "preempted")

_ASIDE = re.compile(r"\..+\.\d+")  # what `_replace` leaves when it is killed
_ENDING_SECONDS = 10.0


class RunDirectory:
    """The files of one run; the class knows their names and nothing about training.

    config.yaml       as composed, interpolations and all: what a later command starts from
    resolved.yaml     what the ranks build
    sources.json      which file and line, or override, set each key of it
    overrides.yaml    what the command line said, to compose it again
    environment.json  versions, hardware, git commit
    result.json       how it ended; absent while it runs
    logs/             rank-N.log, error-rank-N.json of ranks that failed
    .next/            configuration of a start that has not loaded its checkpoint yet
    stop              while this file exists, every rank stops at its next step
    .lock             locked by the launcher and all ranks, whose process ids it lists
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.resolved = self.path / "resolved.yaml"
        self.overrides = self.path / "overrides.yaml"
        self.environment = self.path / "environment.json"
        self.result = self.path / "result.json"
        self.logs = self.path / "logs"
        self.stop = self.path / "stop"
        self._lock_file = self.path / ".lock"
        self.next = self.path / ".next"
        self._lock: Any = None

    def __str__(self) -> str:
        """As short as it can be typed from the working folder."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def is_run(self) -> bool:
        return self.config.is_file() and self.overrides.is_file()

    def is_free(self) -> bool:
        """Whether a new run may be put here: nothing is, or only what a failed start left."""
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            return False
        names = {file.name for file in self.path.iterdir()}
        left = {self.result.name}
        if self._lock_file.name in names:  # only a start of ours makes that
            known = (self.config, self.resolved, self.environment, self.stop, self.logs)
            left |= {self._lock_file.name, "sources.json", *(file.name for file in known)}
            left |= {name for name in names if _ASIDE.fullmatch(name)}
        return not names - left

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, None without one."""
        found = self.path.glob("checkpoints/step-*/manifest.json")
        return max((int(file.parent.name.removeprefix("step-")) for file in found), default=None)

    # -- one owner --------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes the directory, and takes away what an earlier start said about its end.

        Raises:
            BlockingIOError: another process is working in this directory.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self._take()
        if (self.next / "loaded").exists():
            self.adopt()
        for stale in (self.stop, self.result, *self.logs.glob("error-rank-*.json")):
            stale.unlink(missing_ok=True)

    def _take(self) -> None:
        """Keeps a lock on the directory for as long as this process, or a rank of its, lives.

        Taken alone, then shared: the ranks join. Who finds only ranks whose launcher has ended
        waits a little, for they are ending too.
        """
        deadline = time.monotonic() + _ENDING_SECONDS
        while not (self._flock(shared=False) and self._flock(shared=True)):
            self.release()
            holders = self.holders()
            ending = bool(holders) and not any(h["role"] == "launcher" for h in holders)
            if not ending or time.monotonic() > deadline:
                raise BlockingIOError(self._refusal(holders))
            time.sleep(0.1)
        if self._lock is not None:
            self._lock.truncate(0)
            self._sign("launcher")

    def join(self, rank: int) -> None:
        """Holds the lock together with the launcher and the other ranks.

        Raises:
            BlockingIOError: another command has the directory: this rank's launcher has ended.
        """
        if not self._flock(shared=True):
            raise BlockingIOError(self._refusal(self.holders()))
        self._sign(f"rank {rank}")

    def _flock(self, *, shared: bool) -> bool:
        """Locks without waiting; whether it worked, or nothing can be locked here."""
        try:
            import fcntl
        except ImportError:  # not POSIX: nothing is locked
            return True
        if self._lock is None:
            self._lock = self._lock_file.open("a+", encoding="utf-8")
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def _sign(self, role: str) -> None:
        """Appends this process to the list of those that hold the lock."""
        if self._lock is not None:
            entry = {"role": role, "pid": os.getpid(), "host": platform.node()}
            self._lock.write(json.dumps(entry) + "\n")
            self._lock.flush()

    def holders(self) -> list[dict[str, Any]]:
        """Who holds the lock: `role` ("launcher" or "rank N"), `pid`, `host`; on this host only
        processes that live."""
        try:
            lines = self._lock_file.read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return []
        here = platform.node()
        return [h for h in found if h["host"] != here or _lives(h["pid"])]

    def _refusal(self, holders: list[dict[str, Any]]) -> str:
        owners = [h for h in holders if h["role"] == "launcher"] or holders
        who = ", ".join(f"{h['role']} with pid {h['pid']} on {h['host']}" for h in owners)
        return (
            f'another process is working in "{self}"{who and f" ({who})"}; wait for it, or stop it '
            f"with: touch {shlex.quote(str(self.stop))}"
        )

    def release(self) -> None:
        """Lets another process work here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- a start that goes on with the run, until it has loaded its checkpoint ------------------

    def stage(self) -> RunDirectory:
        """Where such a start writes its configuration: empty, and beside the run's own."""
        shutil.rmtree(self.next, ignore_errors=True)
        self.next.mkdir()
        return RunDirectory(self.next)

    @property
    def to_build(self) -> Path:
        """The configuration that ranks build now."""
        staged = self.next / self.resolved.name
        return staged if staged.exists() else self.resolved

    def adopt(self) -> None:
        """Make what was staged the run's own, if anything was."""
        if not self.next.is_dir():
            return
        done = self.next / "loaded"  # a start that dies from here on is finished by the next one
        done.touch()
        for file in sorted(self.next.iterdir()):
            if file != done:
                os.replace(file, self.path / file.name)
        self.unstage()

    def unstage(self) -> None:
        shutil.rmtree(self.next, ignore_errors=True)

    def write_command(self, overrides: list[str], config_name: str, config_dirs: list[str]) -> None:
        command = {
            "config_name": config_name,
            "config_dirs": config_dirs,
            "overrides": overrides,
        }
        _replace(self.overrides, yaml.safe_dump(command, sort_keys=False, allow_unicode=True))

    def read_command(self) -> dict[str, Any]:
        """`overrides`, `config_name` and `config_dirs` of the run's last start."""
        return yaml.safe_load(self.overrides.read_text(encoding="utf-8"))

    def write_text(self, file: Path, text: str) -> None:
        _replace(file, text)

    def write_result(self, result: dict[str, Any], *, tell: bool = True) -> None:
        """Write `result.json`; where it cannot be written, `tell` on the console what it would
        hold."""
        text = json.dumps(_plain(result), indent=2)
        try:
            _replace(self.result, text + "\n")
        except OSError as error:
            told = f"{self.result} cannot be written ({error}); it would be\n{text}"
            if tell:
                print(told, file=sys.stderr)

    def read_result(self) -> dict[str, Any] | None:
        return _read_json(self.result)

    # -- ranks that failed ------------------------------------------------------------------

    def write_error(self, failure: dict[str, Any]) -> bool:
        """Leaves word of a rank's failure; True when no other rank has failed before it."""
        first = not self.errors()
        text = json.dumps(_plain(failure | {"time": time.time()}))
        _replace(self.logs / f"error-rank-{failure['rank']}.json", text)
        return first

    def errors(self) -> list[dict[str, Any]]:
        """What failed ranks left, the earliest first: the others usually fail because of it."""
        found = [_read_json(file) for file in self.logs.glob("error-rank-*.json")]
        return sorted((e for e in found if e), key=lambda error: error.pop("time"))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    try:  # a zombie has released its locks
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _replace(file: Path, text: str) -> None:
    """Writes aside and renames: a reader sees the old file or the new one, never half of one."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN, and knows no tensors, arrays or paths."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
