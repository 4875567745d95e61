"""Run a sweep: each job in its own process, failed jobs recorded, a table at the end."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import math
import os
import shlex
import signal
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from ditty_di.cli import composing
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import argument, quoted
from ditty_di.config import ConfigError, Graph
from ditty_di.launch.local import visible_gpus
from ditty_di.launch.rundir import GOOD_STATUSES, RunDirectory
from ditty_di.launch.worker import collect_garbage
from ditty_di.messages import columns
from ditty_di.sweeps.warm import TARGETS, WarmJobs

#: Columns that are left out where no job has a value.
_OPTIONAL = ("step", "tokens_per_second")
_COLUMNS = ("job", "status", "objective", "step", "tokens_per_second", "folder", "error")


class Results(Callback):
    """Hydra callback (conf/hydra/ditty_di.yaml) that prepares a sweep before its first job."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the sweep's folder and the targets to import.

        Args:
            config: the composed configuration, with Hydra's section.
            **kwargs: ignored.
        """
        Results.folder = Path(config.hydra.sweep.dir)
        with contextlib.suppress(ConfigError):  # each job reports what is wrong with its own
            nodes = Graph(config).nodes("task").values()
            os.environ[TARGETS] = " ".join(sorted({node.target for node in nodes}))


def run(command: Command) -> int:
    """Run every job of a sweep and print the table; return 1 when any of them failed.

    Args:
        command: the parsed command line.
    """
    Results.folder = None
    JobsLauncher.command = command
    _register_plugins()
    failure: Exception | None = None
    collect_garbage()
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


def _register_plugins() -> None:
    """Register our launchers and the sweeper with Hydra, which takes plugins of this package only.

    Its own search through that package has ended when a command turns out to be a sweep.
    """
    folder = Path(__file__).with_name("plugins")
    sys.path.append(str(folder))
    for file in folder.glob("hydra_plugins/*.py"):
        module = importlib.import_module(f"hydra_plugins.{file.stem}")
        for plugin in vars(module).values():
            if isinstance(plugin, type) and plugin.__module__ == module.__name__:
                Plugins.instance().register(plugin)


def job(command: Command) -> float | None:
    """Run the job whose configuration Hydra has composed; return its objective, None on failure.

    Args:
        command: the parsed command line of the sweep.
    """
    config = HydraConfig.get()
    objectives: list[float | None] = []
    jobs = [(0, SweepJob(config, command))]
    _run(jobs, [{}], lambda number, objective: objectives.append(objective))
    return objectives[0]


def hydra_section(
    loader: ConfigLoader, config: DictConfig, index: int, typed: Sequence[str]
) -> Any:
    """Return Hydra's section of a job's configuration, for a launcher or sweeper.

    Args:
        loader: composes the job.
        config: the sweep's configuration.
        index: number of the job.
        typed: overrides of the job.
    """
    composed = loader.load_sweep_config(config, list(typed))
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = index
    HydraConfig.instance().set_config(composed)  # for values that refer to ${hydra:job.num}
    return composed.hydra


def folder_of(config: Any) -> Path:
    """Return the folder of a job, from Hydra's section of its configuration."""
    return Path(config.sweep.dir) / config.sweep.subdir


class SweepJob:
    """A job of a sweep, from Hydra's own section of its configuration."""

    def __init__(self, config: Any, command: Command) -> None:
        self.run_directory = RunDirectory(folder_of(config))
        self.sweep_folder = Path(config.sweep.dir)
        self.overrides = list(config.overrides.task)
        folders = [option for path in command.config_dirs for option in ("--config-dir", path)]
        search = [o for o in config.overrides.hydra if o.startswith("hydra.searchpath=")]
        run_option = f"run={quoted(str(self.run_directory.path))}"
        options = ["--config-name", command.config_name, *folders, *search]
        self.arguments = [*options, *self.overrides, run_option]

    def record(self, code: int, lost: str | None = None) -> float | None:
        """Add the ended job to the sweep's list; return its objective, None if it failed.

        Args:
            code: exit code of its process, minus the signal's number if one killed it.
            lost: the error of a job without a result; None names the exit code.
        """
        result = self.run_directory.read_result()
        if result is None or (code and result["status"] in GOOD_STATUSES):
            how = f"exit code {code}" if code >= 0 else signal.strsignal(-code)
            result = {"status": "failed", "error": lost or f"the job's process ended with {how}"}
            self.run_directory.path.mkdir(parents=True, exist_ok=True)
            self.run_directory.write_result(result)
        line = {"folder": str(self.run_directory), "overrides": self.overrides}
        with (self.sweep_folder / "jobs.jsonl").open("a", encoding="utf-8") as jobs:
            jobs.write(json.dumps(line) + "\n")
        return result.get("objective") if result["status"] in GOOD_STATUSES else None


def _run(
    jobs: Iterable[tuple[int, SweepJob]],
    slots: Sequence[dict[str, str]],
    ended: Callable[[int, float | None], None],
) -> None:
    """Run jobs, as many at once as there are slots.

    Args:
        jobs: with their numbers; the next one is taken when a slot is free.
        slots: environment variables of the jobs in each slot.
        ended: called with the number of a job and its objective as it ends.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop.
    """
    started: list[tuple[int, SweepJob]] = []

    def commands() -> Iterable[list[str]]:
        for number, job in jobs:
            started.append((number, job))
            yield job.arguments

    def end(position: int, code: int) -> None:
        number, job = started[position]
        ended(number, job.record(code))

    runner = WarmJobs(slots)
    runner.run(commands(), end)
    if runner.signals.first is not None:
        raise KeyboardInterrupt


class JobsLauncher(Launcher):
    """Base of Hydra's launchers whose jobs are processes that run commands.

    Attributes:
        command: the parsed command line of the sweep; set before Hydra makes the object.
    """

    command: Command

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what composes the jobs; called by Hydra.

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
        objectives: dict[int, float | None] = {}
        self.run(enumerate(job_overrides, initial_job_idx), objectives.__setitem__)
        return [
            JobReturn(
                overrides=list(overrides),
                _return_value=objectives[index],
                status=JobStatus.COMPLETED,
            )
            for index, overrides in enumerate(job_overrides, initial_job_idx)
        ]

    @abstractmethod
    def run(
        self,
        jobs: Iterable[tuple[int, Sequence[str]]],
        ended: Callable[[int, float | None], None],
    ) -> None:
        """Run jobs to their end.

        Args:
            jobs: number and overrides.
            ended: called with the number of a job and its objective (None if it failed).

        Raises:
            KeyboardInterrupt: the sweep was asked to stop.
        """

    def composed(self, number: int, overrides: Sequence[str]) -> SweepJob:
        """Return a job of the sweep, whose folder exists then."""
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        return SweepJob(hydra_section(self.loader, self.config, number, overrides), self.command)


class ParallelJobs(JobsLauncher):
    """Hydra's launcher `parallel`: several jobs of a sweep at once on this machine.

    Args:
        jobs: number of jobs at a time.
        gpus_per_job: number of visible GPUs reserved for each job; None lets each job use all.

    Raises:
        ValueError: `jobs` jobs of `gpus_per_job` GPUs need more than there are.
    """

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

    def run(
        self,
        jobs: Iterable[tuple[int, Sequence[str]]],
        ended: Callable[[int, float | None], None],
    ) -> None:
        """Run jobs, each asked for as soon as there is room for it; see `JobsLauncher.run`."""
        composed = ((number, self.composed(number, overrides)) for number, overrides in jobs)
        _run(composed, self.slots, ended)


def table(folder: Path) -> list[dict[str, Any]]:
    """Print a sweep's jobs, best objective first, and write results.json and results.csv.

    Args:
        folder: the sweep's folder.

    Returns:
        The rows.
    """
    if not (file := folder / "jobs.jsonl").exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
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
    names = ["job", "changed", *_COLUMNS[1:3], *more, *_COLUMNS[3:]]
    rows = [dict.fromkeys(names) | row for row in rows]
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as table_file:
        writer = csv.DictWriter(table_file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nbest first; the same table in {folder}/results.csv and results.json")
    print(f"as a page: python -m ditty_di task=report {argument('run', str(folder))}")
    shown = [c for c in names[:-1] if c not in _OPTIONAL or any(row[c] is not None for row in rows)]
    heads = [column.replace("_", " ") for column in shown]
    print(columns([heads, *([_cell(row[column]) for column in shown] for row in rows)]))
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
