"""The run directory: its files, its owner, and how the run ended."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import yaml

from ditty_di.io import json_value, read_json, read_text, write_json, write_text

#: Statuses of `result.json` that are no failure.
GOOD_STATUSES = ("finished", "pruned", "preempted", "submitted")

_TEMPORARY = re.compile(r"\..+\.\d+")  # left by `ditty_di.io.replacing` when the process is killed
_ENDING_SECONDS = 10.0


class RunDirectory:
    """The files of one run, without any knowledge of training.

    config.yaml       as composed, with interpolations: what a later command starts from
    resolved.yaml     what the ranks build
    sources.json      which file and line, or override, set each of its keys
    overrides.yaml    the command line, to compose it again
    environment.json  versions, hardware, git commit
    result.json       how the run ended, or that a scheduler has it; absent while it runs
    job.json          the scheduler's job that has the run, or had it
    logs/             rank-N.log, error-rank-N.json of ranks that failed
    .next/            configuration of a start that has not loaded its checkpoint yet
    .temporary        exists in the directory of a task that leaves no run
    stop              while this file exists, every rank stops at its next step
    .lock             locked by the launcher and all ranks, whose process ids it lists

    Args:
        path: the directory; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.resolved = self.path / "resolved.yaml"
        self.overrides = self.path / "overrides.yaml"
        self.environment = self.path / "environment.json"
        self.result = self.path / "result.json"
        self.job = self.path / "job.json"
        self.logs = self.path / "logs"
        self.stop = self.path / "stop"
        self.temporary = self.path / ".temporary"
        self.next = self.path / ".next"
        self._lock_file = self.path / ".lock"
        self._lock: TextIO | None = None

    def __str__(self) -> str:
        """Return the path, relative to the working folder where it is inside."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def is_run(self) -> bool:
        """Return whether the directory holds a run."""
        return self.config.is_file() and self.overrides.is_file()

    def is_temporary(self) -> bool:
        """Return whether it is removed at the end: the task leaves no run (`run: false`)."""
        return self.temporary.exists()

    def is_free(self) -> bool:
        """Return whether a new run can use it: it is empty but for files of a failed start."""
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            return False
        names = {file.name for file in self.path.iterdir()}
        left = {self.result.name}
        if self._lock_file.name in names:  # only our own start creates it
            known = (self.config, self.resolved, self.environment, self.stop, self.logs)
            left |= {self._lock_file.name, "sources.json", *(file.name for file in known)}
            left |= {name for name in names if _TEMPORARY.fullmatch(name)}
        return not names - left

    def sweep(self) -> Path | None:
        """Return the folder of the sweep whose job the run is, None of a run of its own."""
        above = self.path.parents[:4]  # hydra.sweep.subdir may have a few levels
        return next((p for p in above if (p / "multirun.yaml").is_file()), None)

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, None without one."""
        found = self.path.glob("checkpoints/step-*/manifest.json")
        return max((int(file.parent.name.removeprefix("step-")) for file in found), default=None)

    def resume_point(self) -> str:
        """Return where the run goes on from, as the end of a message."""
        step = self.newest_step()
        return "; no checkpoint exists" if step is None else f"; the run goes on from step {step}"

    def interrupted(self, how: str) -> dict[str, Any]:
        """Return the failure of a run that a user or a signal ended.

        Args:
            how: what happened.
        """
        return {"status": "interrupted", "error": how + self.resume_point()}

    # -- one owner --------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the directory, lock it, and remove what an earlier start left about its end.

        Raises:
            BlockingIOError: another process is working in this directory.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self._own()
        if (self.next / "loaded").exists():
            self.adopt()
        self.stop.unlink(missing_ok=True)
        self.forget_end()

    def forget_end(self) -> None:
        """Remove what an earlier start of the ranks left about its end."""
        for stale in (self.result, *self.logs.glob("error-rank-*.json")):
            stale.unlink(missing_ok=True)

    def _own(self) -> None:
        """Lock the directory for as long as this process, or one of its ranks, lives.

        The lock is taken exclusively, then shared so that the ranks can join. Ranks whose launcher
        has ended are about to end too, so they are waited for.
        """
        deadline = time.monotonic() + _ENDING_SECONDS
        while not (self._flock(fcntl.LOCK_EX) and self._flock(fcntl.LOCK_SH)):
            self.release()
            holders = self.holders()
            ending = bool(holders) and not any(h["role"] == "launcher" for h in holders)
            if not ending or time.monotonic() > deadline:
                raise BlockingIOError(self._refusal(holders))
            time.sleep(0.1)
        self._sign("launcher", truncate=True)

    def join(self, rank: int | None, *, alone: bool = False) -> None:
        """Share the lock with the launcher and the other ranks.

        Args:
            rank: this rank; None for the launcher of one of several hosts.
            alone: remove all others from the list of holders, which have ended.

        Raises:
            BlockingIOError: this rank's launcher has ended and another command owns the directory.
        """
        if not self._flock(fcntl.LOCK_SH):
            raise BlockingIOError(self._refusal(self.holders()))
        self._sign("launcher" if rank is None else f"rank {rank}", truncate=alone)

    def _flock(self, kind: int) -> bool:
        """Lock without waiting; return whether it worked, also where nothing can be locked."""
        if self._lock is None:
            self._lock = self._lock_file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        return True

    def _sign(self, role: str, *, truncate: bool = False) -> None:
        """Append this process to the list of those that hold the lock."""
        assert self._lock is not None
        if truncate:
            self._lock.truncate(0)
        entry = {"role": role, "pid": os.getpid(), "host": platform.node()}
        self._lock.write(json.dumps(entry) + "\n")
        self._lock.flush()

    def holders(self) -> list[dict[str, Any]]:
        """Return who holds the lock: `role` ("launcher" or "rank N"), `pid`, `host`.

        Processes of this host are listed only while they live.
        """
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
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- configuration --------------------------------------------------------------------------

    def stage(self) -> RunDirectory:
        """Return an empty directory for the configuration of a start that resumes the run.

        It becomes the run's own by `adopt`, once the checkpoint is loaded.
        """
        self.unstage()
        self.next.mkdir()
        return RunDirectory(self.next)

    @property
    def to_build(self) -> Path:
        """The resolved configuration that ranks build now."""
        staged = self.next / self.resolved.name
        return staged if staged.exists() else self.resolved

    def adopt(self) -> None:
        """Make the staged configuration the run's own, if there is one."""
        if not self.next.is_dir():
            return
        loaded = self.next / "loaded"  # if this process dies from here on, the next start goes on
        loaded.touch()
        for file in sorted(self.next.iterdir()):
            if file != loaded:
                os.replace(file, self.path / file.name)
        self.unstage()

    def unstage(self) -> None:
        """Remove the staged configuration."""
        shutil.rmtree(self.next, ignore_errors=True)

    def write_command(self, overrides: list[str], config_name: str, config_dirs: list[str]) -> None:
        """Write `overrides.yaml`.

        Args:
            overrides: Hydra overrides that compose this run again.
            config_name: name of the primary configuration.
            config_dirs: further folders of configuration files.
        """
        command = {
            "config_name": config_name,
            "config_dirs": config_dirs,
            "overrides": overrides,
        }
        write_text(self.overrides, yaml.safe_dump(command, sort_keys=False, allow_unicode=True))

    def read_command(self) -> dict[str, Any]:
        """Return `overrides`, `config_name` and `config_dirs` of the run's last start."""
        return yaml.safe_load(self.overrides.read_text(encoding="utf-8"))

    # -- how it ended ---------------------------------------------------------------------------

    def write_result(self, result: dict[str, Any], *, tell: bool = True) -> None:
        """Write `result.json`.

        Args:
            result: how the run ended.
            tell: print it on standard error if it cannot be written.
        """
        try:
            write_json(self.result, result)
        except OSError as error:
            text = json.dumps(json_value(result), indent=2)
            if tell:
                message = f"{self.result} cannot be written ({error}); it would be\n{text}"
                print(message, file=sys.stderr)

    def read_result(self) -> dict[str, Any] | None:
        """Return the content of `result.json`, None without one."""
        return read_json(self.result)

    def write_error(self, failure: dict[str, Any]) -> bool:
        """Write `logs/error-rank-N.json`; return whether no other rank has failed before.

        Args:
            failure: with the `rank` that failed.
        """
        first = not self.errors()
        file = self.logs / f"error-rank-{failure['rank']}.json"
        write_json(file, failure | {"time": time.time()})
        return first

    def errors(self) -> list[dict[str, Any]]:
        """Return the errors of failed ranks, the earliest first: it usually caused the others."""
        found = [read_json(file) for file in self.logs.glob("error-rank-*.json")]
        return sorted((e for e in found if e), key=lambda error: error.pop("time"))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    state = read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1]
    return state != ["Z"]  # a zombie has released its locks
