"""Tasks that look at runs: a page about them, and the command of the best one.

As the tasks of `inspect`, each is called with the graph in the parent process, without torch.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from ditty_di.cli.command import nearest
from ditty_di.config import ConfigError, Graph
from ditty_di.io import write_text
from ditty_di.report import runs as reading
from ditty_di.report.words import number, size


def report(
    graph: Graph,
    /,
    *,
    runs: str | Sequence[str] | None,
    output: str | None = None,
    points: int = 2000,
    ignore: Sequence[str] = (),
) -> None:
    """Write one HTML page about runs and print where it is.

    Args:
        graph: unused; every task of this kind takes it.
        runs: one folder or several: of a run, of a sweep, or of either.
        output: file of the page; None is `report.html` in the folder, or here for several.
        points: points of a curve that are drawn, of all runs together.
        ignore: keys that cannot change the numbers; they come last in the differences.

    Raises:
        ConfigError: a folder is missing or has no run, or what draws is not installed.
    """
    if not runs:
        raise ConfigError("task=report: add run=FOLDER" + nearest(Path("run")))
    from ditty_di.report import page

    started = time.perf_counter()
    folders = [runs] if isinstance(runs, str) else list(runs)
    found = reading.name_all(reading.require(folders, "run"), folders)
    alone = Path(folders[0]).expanduser() if len(folders) == 1 else Path.cwd()
    file = Path(output).expanduser() if output is not None else alone / "report.html"
    counted = f"{len(found)} run{'s' * (len(found) > 1)}"
    title = "/".join(alone.absolute().parts[-2:]) if len(folders) == 1 else counted
    text = page.render(found, title, points=points, ignore=ignore)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    seconds = time.perf_counter() - started
    print(f"{file} ({counted}, {size(len(text.encode()))}, {seconds:.1f} s)")


def best(graph: Graph, /, *, sweep: str) -> None:
    """Print the command that repeats the finished run with the lowest objective.

    What else is printed are comments of a shell, so that the whole can be run by one.

    Args:
        graph: unused; every task of this kind takes it.
        sweep: folder of a sweep, or of runs.

    Raises:
        ConfigError: the folder is missing or has no run.
        SystemExit: no run has finished with an objective; the exit code is 1.
    """
    found = reading.name_all(reading.require([sweep], "sweep"), [sweep])
    done = [run for run in found if run.status == "finished" and run.objective is not None]
    done = [run for run in done if run.command]
    if not done:
        how = ", ".join(f"{run.name}: {run.status}" for run in found[:5])
        raise SystemExit(f"sweep={sweep}: none of {len(found)} runs has finished ({how})")
    run = min(done, key=lambda run: (run.objective, run.name))
    at = run.result.get("objective_step") or run.step
    print(f"# objective {number(run.objective)} at step {at}, the lowest of {len(done)} finished")
    print(f"# {run.directory}")
    allowed = [v for key, v in run.config.items() if re.match(r"allow_targets\b", key) and v]
    if allowed:
        names = ",".join(map(str, allowed))
        print(f"# it ran with 'allow_targets=[{names}]'; type that too if you trust these targets")
    print(command(run))


def command(run: reading.Run) -> str:
    """Return what to type to repeat a run from where we are.

    Args:
        run: the run.
    """
    folder = run.environment.get("folder")
    words = ["python", "-m", "ditty_di"]
    if (name := run.command.get("config_name", "config")) != "config":
        words += ["--config-name", name]
    own = os.path.join(os.path.realpath(folder or "."), "conf")
    for directory in run.command.get("config_dirs") or ():
        if directory != own:  # that of the working folder is found there
            words += ["--config-dir", directory]
    words += run.command.get("overrides") or []
    moved = folder is not None and Path(folder) != Path.cwd()
    text = shlex.join(words)
    return f"cd {shlex.quote(folder)} && {text}" if moved and folder else text
