"""A sweep: each job a fresh process, failures kept and marked, a table at the end."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import open_dict, read_write

from ditty_di.cli.overrides import quoted, value_of
from ditty_di.config import ConfigError, Graph
from ditty_di.launchers.local import visible_gpus
from ditty_di.launchers.warm import TARGETS, Job, WarmJobs
from ditty_di.rundir import GOOD_STATUSES, RunDirectory

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ditty_di.cli.command import Command

_COLUMNS = ("job", "status", "objective", "step", "tokens_per_second", "folder", "error")
_GRACE_SECONDS = 300.0


class Results(Callback):
    """Hydra's callback (conf/hydra/ditty_di.yaml): sees a sweep's configuration before anybody."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Results.folder = Path(config.hydra.sweep.dir)
        with contextlib.suppress(ConfigError):  # each job reports what is wrong with its own
            nodes = Graph(config).nodes("task").values()
            os.environ[TARGETS] = " ".join(sorted({node.target for node in nodes}))
        # Optuna's sweeper gives up at the first failed trial, unless somebody has chosen.
        key, sweeper = "max_failure_rate", config.hydra.sweeper
        if (
            key in sweeper
            and value_of(config.hydra.overrides.hydra, f"hydra.sweeper.{key}") is None
        ):
            with read_write(config):
                sweeper[key] = 1.0


def run(command: Command) -> int:
    """Runs every job of a sweep; 1 when any of them failed."""
    from ditty_di.cli import composing

    Results.folder = None
    ParallelJobs.command = command
    sys.path.append(str(Path(__file__).with_name("plugins")))  # where Hydra finds its subclass
    failure: Exception | None = None
    try:
        composing.run(command, lambda config: job(command))
    except KeyboardInterrupt:
        print("stopped; jobs that had not begun are not in the table", file=sys.stderr)
    except Exception as error:
        failure = error
    rows: list[dict[str, Any]] = table(Results.folder) if Results.folder else []
    if failure is not None:
        if not rows:
            raise failure
        print(f"the sweep ended early: {failure}", file=sys.stderr)
        return 1
    return 0 if all(row["status"] in GOOD_STATUSES for row in rows) else 1


def job(command: Command) -> float | None:
    """Run the job whose configuration Hydra has composed; return its objective, None on failure.

    None is what both Hydra's own sweeper (which ignores it) and Optuna's (which counts the trial
    as failed, where NaN would end the study) go on after.
    """
    config = HydraConfig.get()
    return _run([_SweepJob(config, Path(config.runtime.output_dir), command)], [{}])[0]


class _SweepJob(Job):
    """A job of a sweep, from Hydra's own part of its configuration."""

    def __init__(self, config: Any, folder: Path, command: Command) -> None:
        self.run_directory, self.sweep_folder = RunDirectory(folder), Path(config.sweep.dir)
        self.overrides = list(config.overrides.task)
        folders = [option for path in command.config_dirs for option in ("--config-dir", path)]
        search = [o for o in config.overrides.hydra if o.startswith("hydra.searchpath=")]
        where = f"run={quoted(str(self.run_directory.path))}"
        options = ["--config-name", command.config_name, *folders, *search]
        super().__init__([*options, *self.overrides, where])

    def result(self) -> dict[str, Any]:
        """Return the job's `result.json`, or, without one, how its process ended."""
        found = self.run_directory.read_result()
        if found is not None and not (self.code and found["status"] in GOOD_STATUSES):
            return found
        code = self.code or 0
        how = f"exit code {code}" if code >= 0 else signal.strsignal(-code)
        result = {"status": "failed", "error": f"the job's process ended with {how}"}
        self.run_directory.path.mkdir(parents=True, exist_ok=True)
        self.run_directory.write_result(result)
        return result

    def record(self) -> None:
        """Note in the sweep's folder that the job has been run."""
        line = {"folder": str(self.run_directory), "overrides": self.overrides}
        with (self.sweep_folder / "jobs.jsonl").open("a", encoding="utf-8") as jobs:
            jobs.write(json.dumps(line) + "\n")


def _run(jobs: Sequence[_SweepJob], slots: Sequence[dict[str, str]]) -> list[float | None]:
    """Run jobs, as many at once as there are slots; return their objectives.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop.
    """
    objectives: dict[int, float | None] = {}

    def ended(job: _SweepJob) -> None:
        result = job.result()
        job.record()
        good = result["status"] in GOOD_STATUSES
        objectives[id(job)] = result.get("objective") if good else None

    runner = WarmJobs(slots, _GRACE_SECONDS)
    runner.run(jobs, ended)
    if runner.signalled is not None:
        raise KeyboardInterrupt
    return [objectives[id(job)] for job in jobs]


class ParallelJobs(Launcher):
    """Hydra's launcher `parallel`: several jobs of a sweep at once on this machine.

    Args:
        jobs: how many at once.
        gpus_per_job: how many of the visible GPUs a job gets for itself; None shows it all.

    Raises:
        ValueError: `jobs` jobs of `gpus_per_job` GPUs need more than there are.
    """

    command: Command  # set before Hydra makes the object

    def __init__(self, jobs: int = 2, gpus_per_job: int | None = None) -> None:
        if jobs < 1:
            raise ValueError(f"hydra.launcher.jobs={jobs}: at least one job runs at a time")
        gpus = visible_gpus() if gpus_per_job else []
        size = gpus_per_job or 0
        if size * jobs > len(gpus):
            raise ValueError(
                f"hydra.launcher.gpus_per_job={size}: {jobs} jobs at once need {size * jobs} GPUs "
                f"and there are {len(gpus)}"
            )
        own = [",".join(gpus[n * size : (n + 1) * size]) for n in range(jobs)]
        self.slots = [{"CUDA_VISIBLE_DEVICES": each} if each else {} for each in own]

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        jobs = []
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = index
            HydraConfig.instance().set_config(config)  # for what refers to ${hydra:job.num}
            sweep = config.hydra.sweep
            jobs.append(_SweepJob(config.hydra, Path(sweep.dir) / sweep.subdir, self.command))
        objectives = _run(jobs, self.slots)
        return [
            JobReturn(overrides=list(overrides), _return_value=value, status=JobStatus.COMPLETED)
            for overrides, value in zip(job_overrides, objectives, strict=True)
        ]


def table(folder: Path) -> list[dict[str, Any]]:
    """Prints a sweep's jobs, best objective first, and writes results.json and results.csv."""
    rows = sorted(_rows(folder), key=_rank)
    if not rows:
        return rows
    said = Counter(override for row in rows for override in row["overrides"])
    for row in rows:
        told = [o for o in row["overrides"] if said[o] < len(rows) or len(rows) == 1]
        row["changed"] = shlex.join(told)
    columns = ["job", "changed", *_COLUMNS[1:]]
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nbest first; the same table in {folder}/results.csv and results.json")
    _print(rows, columns[:-1])
    for row in rows:
        if row["error"]:
            print(f"job {row['job']}: {row['error'].splitlines()[0]}")
    return rows


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    # A sweep that was started again in its folder has run its jobs again.
    jobs = {entry["folder"]: entry for entry in map(json.loads, lines)}
    rows = []
    for entry in jobs.values():
        run = RunDirectory(entry["folder"])
        result = run.read_result() or {"status": "failed", "error": "left no result.json"}
        row = {name: result.get(name) for name in _COLUMNS}
        job = run.path.relative_to(folder.absolute()).as_posix()
        rows.append(row | {"job": job, "folder": str(run), "overrides": entry["overrides"]})
    return rows


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    objective = row["objective"]
    return row["status"] not in GOOD_STATUSES, math.inf if objective is None else objective


def _print(rows: list[dict[str, Any]], columns: list[str]) -> None:
    shown = [[_cell(row[column]) for column in columns] for row in rows]
    table = [[column.replace("_", " ") for column in columns], *shown]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for line in table:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
