"""A sweep: each job a fresh process, failures kept and marked, a table at the end."""

from __future__ import annotations

import csv
import json
import math
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import read_write

from ditty_di.cli.overrides import quoted, value_of
from ditty_di.launchers.process import Children, Start
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
    """One job of the sweep, in a process of its own; its objective, None when it failed.

    None is what both Hydra's own sweeper (which ignores it) and Optuna's (which counts the trial
    as failed, where NaN would end the study) go on after.
    """
    config = HydraConfig.get()
    run = RunDirectory(config.runtime.output_dir)
    overrides = list(config.overrides.task)
    folders = [option for folder in command.config_dirs for option in ("--config-dir", folder)]
    search = [o for o in config.overrides.hydra if o.startswith("hydra.searchpath=")]
    child = Children(_stop, _GRACE_SECONDS)
    arguments = [
        *(sys.executable, "-m", "ditty_di", "--config-name", command.config_name),
        *(*folders, *search, *overrides, f"run={quoted(str(run.path))}"),
    ]
    (code,) = child.run([Start(arguments)])
    result = run.read_result()
    if result is None or (code and result["status"] in GOOD_STATUSES):
        how = f"exit code {code}" if code >= 0 else signal.strsignal(-code)
        result = {"status": "failed", "error": f"the job's process ended with {how}"}
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_result(result)
    with (Path(config.sweep.dir) / "jobs.jsonl").open("a", encoding="utf-8") as jobs:
        jobs.write(json.dumps({"folder": str(run.path), "overrides": overrides}) + "\n")
    if child.signalled is not None:
        raise KeyboardInterrupt
    return result.get("objective") if result["status"] in GOOD_STATUSES else None


def _stop(jobs: list[subprocess.Popen], number: signal.Signals) -> None:
    for process in jobs:
        process.send_signal(signal.SIGTERM)


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
