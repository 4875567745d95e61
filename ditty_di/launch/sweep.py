"""Run a sweep: each job in its own process, failed jobs recorded, a table at the end."""

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
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from ditty_di.cli import composing
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import quoted, value_of
from ditty_di.config import ConfigError, Graph
from ditty_di.launch.local import visible_gpus
from ditty_di.launch.rundir import GOOD_STATUSES, RunDirectory
from ditty_di.launch.warm import TARGETS, WarmJobs

#: Columns that are left out where no job has a value.
_OPTIONAL = ("step", "tokens_per_second")
_COLUMNS = ("job", "status", "objective", "step", "tokens_per_second", "folder", "error")


class Results(Callback):
    """Hydra callback (conf/hydra/ditty_di.yaml) that prepares a sweep before its first job."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the sweep's folder and the targets to import, and let trials fail.

        Args:
            config: the composed configuration, with Hydra's section.
            **kwargs: ignored.
        """
        Results.folder = Path(config.hydra.sweep.dir)
        with contextlib.suppress(ConfigError):  # each job reports what is wrong with its own
            nodes = Graph(config).nodes("task").values()
            os.environ[TARGETS] = " ".join(sorted({node.target for node in nodes}))
        # Optuna's sweeper gives up at the first failed trial, unless the user has set a rate.
        key, sweeper = "max_failure_rate", config.hydra.sweeper
        if (
            key in sweeper
            and value_of(config.hydra.overrides.hydra, f"hydra.sweeper.{key}") is None
        ):
            with read_write(config):
                sweeper[key] = 1.0


def run(command: Command) -> int:
    """Run every job of a sweep and print the table; return 1 when any of them failed.

    Args:
        command: the parsed command line.
    """
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

    After None both Hydra's own sweeper (which ignores it) and Optuna's (which counts the trial as
    failed, where NaN would end the study) go on.

    Args:
        command: the parsed command line of the sweep.
    """
    config = HydraConfig.get()
    return _run([SweepJob(config, Path(config.runtime.output_dir), command)], [{}])[0]


class SweepJob:
    """A job of a sweep, from Hydra's own section of its configuration."""

    def __init__(self, config: Any, folder: Path, command: Command) -> None:
        self.run_directory, self.sweep_folder = RunDirectory(folder), Path(config.sweep.dir)
        self.overrides = list(config.overrides.task)
        folders = [option for path in command.config_dirs for option in ("--config-dir", path)]
        search = [o for o in config.overrides.hydra if o.startswith("hydra.searchpath=")]
        run_option = f"run={quoted(str(self.run_directory.path))}"
        options = ["--config-name", command.config_name, *folders, *search]
        self.arguments = [*options, *self.overrides, run_option]

    def record(self, code: int) -> float | None:
        """Add the ended job to the sweep's list; return its objective, None if it failed."""
        result = self.run_directory.read_result()
        if result is None or (code and result["status"] in GOOD_STATUSES):
            how = f"exit code {code}" if code >= 0 else signal.strsignal(-code)
            result = {"status": "failed", "error": f"the job's process ended with {how}"}
            self.run_directory.path.mkdir(parents=True, exist_ok=True)
            self.run_directory.write_result(result)
        line = {"folder": str(self.run_directory), "overrides": self.overrides}
        with (self.sweep_folder / "jobs.jsonl").open("a", encoding="utf-8") as jobs:
            jobs.write(json.dumps(line) + "\n")
        return result.get("objective") if result["status"] in GOOD_STATUSES else None


def _run(jobs: Sequence[SweepJob], slots: Sequence[dict[str, str]]) -> list[float | None]:
    """Run jobs, as many at once as there are slots; return their objectives.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop.
    """
    objectives: list[float | None] = [None] * len(jobs)

    def ended(number: int, code: int) -> None:
        objectives[number] = jobs[number].record(code)

    runner = WarmJobs(slots)
    runner.run([job.arguments for job in jobs], ended)
    if runner.signals.first is not None:
        raise KeyboardInterrupt
    return objectives


class ParallelJobs(Launcher):
    """Hydra's launcher `parallel`: several jobs of a sweep at once on this machine.

    Args:
        jobs: number of jobs at a time.
        gpus_per_job: number of visible GPUs reserved for each job; None lets each job use all.

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
        """Keep what `launch` needs; called by Hydra.

        Args:
            hydra_context: has the loader that composes each job.
            task_function: ignored; jobs run in processes of their own.
            config: the sweep's configuration.
        """
        self.loader, self.config = hydra_context.config_loader, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run jobs; called by Hydra's sweeper.

        Args:
            job_overrides: the overrides of each job.
            initial_job_idx: number of the first one.
        """
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        jobs = []
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = index
            HydraConfig.instance().set_config(config)  # for values that refer to ${hydra:job.num}
            sweep = config.hydra.sweep
            jobs.append(SweepJob(config.hydra, Path(sweep.dir) / sweep.subdir, self.command))
        objectives = self.run_jobs(jobs)
        return [
            JobReturn(overrides=list(overrides), _return_value=value, status=JobStatus.COMPLETED)
            for overrides, value in zip(job_overrides, objectives, strict=True)
        ]

    def run_jobs(self, jobs: Sequence[SweepJob]) -> list[float | None]:
        """Run jobs to their end; return their objectives.

        Args:
            jobs: of this sweep.
        """
        return _run(jobs, self.slots)


def table(folder: Path) -> list[dict[str, Any]]:
    """Print a sweep's jobs, best objective first, and write results.json and results.csv.

    Args:
        folder: the sweep's folder.

    Returns:
        The rows.
    """
    try:
        lines = (folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    # A sweep that was started again in its folder has run its jobs again.
    jobs = {entry["folder"]: entry["overrides"] for entry in map(json.loads, lines)}
    counts = Counter(override for overrides in jobs.values() for override in overrides)
    rows = []
    more: dict[str, None] = {}  # columns of the task's own, in their order
    for path, overrides in jobs.items():
        run = RunDirectory(path)
        result = run.read_result() or {"status": "failed", "error": "left no result.json"}
        row = {name: result.get(name) for name in _COLUMNS}
        row["job"], row["folder"] = run.path.relative_to(folder.absolute()).as_posix(), str(run)
        row["overrides"], own = overrides, result.get("table") or {}
        row.update(own)
        more.update(dict.fromkeys(own))
        differing = [o for o in overrides if counts[o] < len(jobs) or len(jobs) == 1]
        rows.append(row | {"changed": shlex.join(differing)})
    rows.sort(key=_rank)
    columns = ["job", "changed", *_COLUMNS[1:3], *more, *_COLUMNS[3:]]
    rows = [dict.fromkeys(columns) | row for row in rows]
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nbest first; the same table in {folder}/results.csv and results.json")
    shown = [
        c for c in columns[:-1] if c not in _OPTIONAL or any(row[c] is not None for row in rows)
    ]
    cells = [[_cell(row[column]) for column in shown] for row in rows]
    cells.insert(0, [column.replace("_", " ") for column in shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        if row["error"]:
            print(f"job {row['job']}: {row['error'].splitlines()[0]}")
    return rows


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    objective = row["objective"]
    return row["status"] not in GOOD_STATUSES, math.inf if objective is None else objective


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
