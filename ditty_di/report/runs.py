"""Find runs below folders, and read them whatever state they are in."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ditty_di.cli.overrides import key_of, without
from ditty_di.config import ConfigError, flatten
from ditty_di.io import read_json, read_text
from ditty_di.launch.rundir import RunDirectory

#: Files one of which is enough to be a run: those of a start that failed, or of a copy, may lack.
_FILES = ("overrides.yaml", "resolved.yaml", "metrics.jsonl", "result.json")
METRICS = "metrics.jsonl"

#: Seconds without a line after which a run of another machine, whose processes cannot be seen from
#: here, is called stale.
_SILENT_SECONDS = 900.0
_TAIL_BYTES = 1 << 20


def find(folders: Sequence[str | Path]) -> list[RunDirectory]:
    """Return the runs that folders are, or have below them; those of tasks on a run are left out.

    Args:
        folders: runs, sweeps, or folders of either.
    """
    found = {path: None for folder in folders for path in _below(Path(folder).expanduser())}
    return [RunDirectory(path) for path in found]


def require(folders: Sequence[str | Path], key: str) -> list[RunDirectory]:
    """Return the runs in folders, each of which must have one.

    Args:
        folders: see `find`.
        key: the key that they were given with, for messages.

    Raises:
        ConfigError: a folder is missing, or has no run.
    """
    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(f"{key}={folder}: there is no such folder")
        if next(_below(Path(folder).expanduser()), None) is None:
            raise ConfigError(f"{key}={folder}: there is no run in this folder, nor below it")
    return find(folders)


def _below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    except OSError:  # gone meanwhile, or of another user
        return
    names = {entry.name for entry in entries}
    if names.intersection(_FILES):
        yield folder.absolute()
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _below(Path(entry.path))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts job 10 behind job 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def status(run: RunDirectory) -> str:
    """Return how a run is: as in `result.json`, else "running" or, without a process, "stale".

    Args:
        run: its directory.
    """
    result = read_json(run.result)
    if isinstance(result, dict) and isinstance(result.get("status"), str):
        return result["status"]
    try:
        holders = run.holders()
    except (KeyError, TypeError):  # a damaged list
        holders = []
    if any(holder["host"] == platform.node() for holder in holders):
        return "running"
    return "running" if holders and silent_seconds(run) < _SILENT_SECONDS else "stale"


def silent_seconds(run: RunDirectory) -> float:
    """Return the seconds since a run last wrote metrics, a log, its lock or its result."""
    files = (run.path / METRICS, run.logs / "rank-0.log", run.path / ".lock", run.result)
    times = [file.stat().st_mtime for file in files if file.exists()]
    return time.time() - max(times, default=run.path.stat().st_mtime)


def latest(run: RunDirectory) -> dict[str, float]:
    """Return the values of the last report and of the last validation, without reading the rest.

    Args:
        run: its directory.
    """
    try:
        with (run.path / METRICS).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            tail = file.read()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for name in (b'"validation/loss"', b'"loss"'):
        end = len(tail)
        while (at := tail.rfind(name, 0, end)) >= 0:
            begin, stop = tail.rfind(b"\n", 0, at) + 1, tail.find(b"\n", at)
            line = _object(tail[begin:stop] if stop >= 0 else tail[begin:])
            if line and name.decode().strip('"') in line:
                found |= line
                break
            end = at  # half a line, or the name in a text
    return found


def _object(line: bytes | str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Run:
    """What the files of a run say; one that is missing or damaged says nothing.

    Args:
        directory: the run.
        name: for people.

    Attributes:
        problems: what could not be read, in words; complete once everything was asked for.
    """

    def __init__(self, directory: RunDirectory, name: str) -> None:
        self.directory, self.name = directory, name
        self.problems: list[str] = []
        self.series: dict[str, tuple[list[int], list[float | None]]] = defaultdict(lambda: ([], []))
        self.texts: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self.status = status(directory)
        self._read_metrics()

    def _read_metrics(self) -> None:
        damaged = 0
        try:
            lines = (self.directory.path / METRICS).read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            entry = _object(line)
            step = entry.get("step") if entry is not None else None
            if entry is None or not isinstance(step, int):
                damaged += 1
            elif "text" in entry:
                self.texts[str(entry.get("name"))].append((step, str(entry["text"])))
            else:
                for name, value in entry.items():
                    if name != "step" and (value is None or isinstance(value, int | float)):
                        steps, values = self.series[name]
                        steps.append(step)
                        values.append(value)
        if damaged:
            self.problems.append(f"lines of {METRICS} that cannot be read: {damaged}")

    def last(self, name: str) -> float | None:
        """Return the last value of a metric."""
        return self.series[name][1][-1] if name in self.series else None

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return self._json(self.directory.result)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The content of `environment.json`."""
        return self._json(self.directory.environment)

    def _json(self, file: Path) -> dict[str, Any]:
        value = read_json(file)
        if value is None and file.exists():
            self.problems.append(f"{file.name} cannot be read")
        return value if isinstance(value, dict) else {}

    @cached_property
    def config_text(self) -> str:
        """The content of `config.yaml`."""
        return read_text(self.directory.config)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, by dotted key."""
        return flatten(self._yaml(self.directory.config))

    @cached_property
    def command(self) -> dict[str, Any]:
        """The content of `overrides.yaml`: overrides, config_name, config_dirs."""
        return self._yaml(self.directory.overrides)

    def _yaml(self, file: Path) -> dict[str, Any]:
        try:
            value = yaml.load(read_text(file), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:
            self.problems.append(f"{file.name} cannot be read")
            return {}
        return value if isinstance(value, dict) else {}

    @cached_property
    def overrides(self) -> dict[str, str]:
        """What was typed, by key; of a job that did not start, what its sweep gave it."""
        typed = self.command.get("overrides")
        if typed is None and (sweep := self.directory.sweep()) is not None:
            typed = jobs(sweep).get(self.directory.path)
        known = [o for o in typed or () if isinstance(o, str)]
        return {key_of(o): o.partition("=")[2] for o in without(known, "run", "hydra")}

    @property
    def step(self) -> int | None:
        """The last step."""
        steps = [own[-1] for own, _ in self.series.values()]
        return self.result.get("step") or max(steps, default=None)

    @property
    def max_steps(self) -> int | None:
        """The last step that there will be; estimated from the remaining time if need be."""
        for known in map(self.config.get, ("trainer.max_steps", "max_steps")):
            if isinstance(known, int):
                return known
        return estimated_steps(self.step, self.last)

    @property
    def objective(self) -> float | None:
        """The last validation loss, else the last training loss; the smaller the better."""
        known = self.result.get("objective")
        known = self.last("validation/loss") if known is None else known
        return self.last("loss") if known is None else known


def estimated_steps(step: int | None, value: Any) -> int | None:
    """Return the last step by the remaining time.

    Args:
        step: the current one.
        value: returns the last value of a metric, None without one.
    """
    left, each = value("eta_seconds"), value("seconds_per_step")
    return None if step is None or left is None or not each else step + round(left / each)


def jobs(sweep: Path) -> dict[Path, list[str]]:
    """Return folder -> overrides of the jobs of a sweep that have ended.

    Args:
        sweep: its folder.
    """
    lines = read_text(sweep / "jobs.jsonl").splitlines()
    known = [entry for line in lines if (entry := _object(line))]
    # as the folder is now: the sweep may have been moved
    return {sweep.absolute() / Path(e["folder"]).name: e["overrides"] for e in known}


def name_all(directories: Sequence[RunDirectory], folders: Sequence[str | Path]) -> list[Run]:
    """Return runs with names that tell them apart, as short as the given folders allow.

    Args:
        directories: the runs.
        folders: those that the user gave.
    """
    roots = [Path(folder).expanduser().absolute() for folder in folders]

    def name(path: Path) -> str:
        root = next((r for r in roots if path.is_relative_to(r) and path != r), None)
        return str(path.relative_to(root) if root is not None else Path(*path.parts[-2:]))

    names = [name(directory.path) for directory in directories]
    if len({*names}) < len(names):
        names = [str(directory) for directory in directories]
    return [Run(directory, label) for directory, label in zip(directories, names, strict=True)]
