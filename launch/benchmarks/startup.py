"""Seconds until a command answers, or has done its first step, each beside its imports alone.

Cases: `--help`, `--cfg job`, `task=check`, the first optimizer step of the default experiment, and
the first step of a resumed run. Beside each stands a process that imports the same modules of other
packages, in the same order, and does nothing else. It imports them whole, where a training leaves
out what torchtitan imports and does not call (`ditty_di.postponed`): a command may take less.
Command and imports alternate. Measured are wall and CPU seconds of the process; for the steps, wall
seconds until the step is in `metrics.jsonl`. Texts and bytecode are cached by a first round that
does not count.

    launch/bench startup --json startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _here import environment

#: Of a training that only begins.
SMALL = ["export=null", "validator=null", "checkpoint.save_interval=1"]

#: Runs ditty_di and writes each module that is imported to a file.
RECORD = """
import runpy, sys
file = open(sys.argv[1], "a", buffering=1)
sys.addaudithook(lambda event, args: file.write(args[0] + "\\n") if event == "import" else None)
sys.argv = ["ditty_di", *sys.argv[2:]]
runpy.run_module("ditty_di", run_name="__main__", alter_sys=True)
"""
IMPORT = """
import importlib, sys
for name in open(sys.argv[1]).read().split():
    try:
        importlib.import_module(name)
    except Exception:  # optional packages, which the command looks for in vain too
        pass
"""


class Case:
    """A command in a working folder, and what measures it."""

    def __init__(self, folder: Path, name: str, arguments: list[str], *, steps: bool) -> None:
        self.folder, self.name, self.arguments, self.steps = folder, name, arguments, steps
        self.modules = folder / f"{name}.modules"
        self.prepare: Callable[[], None] = lambda: None
        self.times: dict[str, list[dict[str, float]]] = {"command": [], "imports": []}

    def run(self, *command: str) -> dict[str, float]:
        """Run Python with these arguments; return what it took."""
        self.prepare()
        metrics = self.folder / "run" / "metrics.jsonl"
        log = (self.folder / "log").open("w")
        began, start = time.time(), time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            raise SystemExit(f"{self.name} failed\n{(self.folder / 'log').read_text()[-3000:]}")
        found = {"wall_seconds": wall, "cpu_seconds": used.ru_utime + used.ru_stime}
        if self.steps and "-m" in command:
            found["wall_seconds"] = metrics.stat().st_mtime - began
            found["process_seconds"] = wall
        return found

    def record(self) -> None:
        """Find out which modules of other packages the command imports."""
        self.run("-c", RECORD, str(self.modules), *self.arguments)
        names = dict.fromkeys(self.modules.read_text().split())
        others = [name for name in names if name.partition(".")[0] != "ditty_di"]
        self.modules.write_text("\n".join(others))

    def measure(self) -> None:
        """Measure the command and its imports once."""
        self.times["command"].append(self.run("-m", "ditty_di", *self.arguments))
        self.times["imports"].append(self.run("-c", IMPORT, str(self.modules)))

    def result(self) -> dict[str, Any]:
        """Return the medians."""
        told = [argument.replace(f"{self.folder}/", "") for argument in self.arguments]
        found: dict[str, Any] = {"arguments": told}
        for kind, times in self.times.items():
            names = times[0].keys()
            found[kind] = {n: statistics.median(one[n] for one in times) for n in names}
            found[kind]["wall_seconds_all"] = [one["wall_seconds"] for one in times]
        return found


def cases(folder: Path) -> list[Case]:
    run, before = folder / "run", folder / "before"
    more = ["max_steps=2"]
    made = [
        Case(folder, "help", ["--help"], steps=False),
        Case(folder, "cfg_job", ["--cfg", "job"], steps=False),
        Case(folder, "check", ["task=check"], steps=False),
        Case(folder, "first_step", [*SMALL, "max_steps=1", f"run={run}"], steps=True),
        Case(folder, "resume", [*more, f"run={run}"], steps=True),
    ]

    def clear() -> None:
        if run.exists() and not before.exists():
            shutil.move(run, before)  # that of the first case is what is resumed
        shutil.rmtree(run, ignore_errors=True)

    def resumable() -> None:
        clear()
        shutil.copytree(before, run)

    made[3].prepare, made[4].prepare = clear, resumable
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of cases; resume needs first_step")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    here = environment()
    print(f"{here['processor']}, load {here['load_average']:.1f}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
        )
        made = cases(folder)
        names = options.only or [case.name for case in made]
        measured = [case for case in made if case.name in names]
        for case in measured:
            case.record()
        for _ in range(options.rounds):
            for case in measured:
                case.measure()
    results = {case.name: case.result() for case in measured}
    print(f"{'':14}{'wall s':>10}{'imports':>10}{'CPU s':>10}{'imports':>10}")
    for name, found in results.items():
        row = [found[k][s] for s in ("wall_seconds", "cpu_seconds") for k in ("command", "imports")]
        print(f"{name:14}" + "".join(f"{value:10.2f}" for value in row))
    if options.json:
        here["load_average_after"] = os.getloadavg()[0]
        report = {"environment": here, "rounds": options.rounds, "cases": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
