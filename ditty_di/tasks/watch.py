"""The task that shows all runs below some folders live in a terminal."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ditty_di.config import ConfigError, Graph
from ditty_di.io import read_json, read_text
from ditty_di.launch.rundir import RunDirectory
from ditty_di.report import runs as reading
from ditty_di.report.words import clock, number

_COLORS = {"finished": "green", "running": "bold cyan", "pruned": "dim", "preempted": "yellow"}
#: Columns: attribute, heading, and from which width of the terminal on it is shown.
_COLUMNS = (
    ("name", "run", 0),
    ("status", "status", 0),
    ("step", "step", 0),
    ("loss", "loss", 50),
    ("validation", "held out", 62),
    ("speed", "tokens/s", 84),
    ("eta", "ETA", 74),
    ("age", "last sign", 96),
)
_FIRST = ("running", "stale")  # statuses that come first


@dataclass
class Line:
    """A run as one line of the table; None is not known."""

    name: str
    status: str
    age: float  # seconds since it last wrote something
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    validation: float | None = None
    speed: float | None = None
    eta: float | None = None


@dataclass
class Watcher:
    """Look at runs again and again, and read only what has changed.

    Args:
        folders: where to look for runs.
    """

    folders: Sequence[str]
    _known: dict[str, tuple[tuple[Any, ...], Line]] = field(default_factory=dict)

    def look(self) -> list[Line]:
        """Return a line for each run that is there now."""
        directories = reading.find(self.folders)
        names = [str(directory) for directory in directories]
        return [self._line(d, name) for d, name in zip(directories, names, strict=True)]

    def _line(self, run: RunDirectory, name: str) -> Line:
        status, age = reading.status(run), reading.silent_seconds(run)
        mark = (status, *(_modified(f) for f in (run.path / reading.METRICS, run.result)))
        if name in self._known and self._known[name][0] == mark:
            line = self._known[name][1]
            line.age = age
            return line
        last, result = reading.latest(run), read_json(run.result)
        last |= result if isinstance(result, dict) else {}
        step = last.get("step")
        line = Line(name, status, age, step=int(step) if step is not None else None)
        line.max_steps = _max_steps(run) or reading.estimated_steps(line.step, last.get)
        line.loss, line.validation = last.get("loss"), last.get("validation/loss")
        line.speed = last.get("tokens_per_second")
        line.eta = last.get("eta_seconds") if status == "running" else None
        self._known[name] = mark, line
        return line


def _modified(file: Any) -> tuple[int, int] | None:
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def _max_steps(run: RunDirectory) -> int | None:
    """Return the trainer's `max_steps` without parsing all of a configuration."""
    text = read_text(run.config)
    for pattern in (r"^trainer:\n(?:  .*\n)*?  max_steps: (\d+)$", r"^max_steps: (\d+)$"):
        if found := re.search(pattern, text, re.MULTILINE):
            return int(found[1])
    return None


def watch(
    graph: Graph,
    /,
    *,
    runs: str | Sequence[str],
    sort: str = "age",
    once: bool = False,
    seconds: float = 2.0,
    hours: float | None = None,
) -> None:
    """Show all runs below some folders until Ctrl-C; into a pipe, once.

    Args:
        graph: unused; every task of this kind takes it.
        runs: folders.
        sort: column to sort by, after running and stale runs, which come first.
        once: print the table once.
        seconds: time between two looks.
        hours: leave out runs that have ended and have written nothing for so long; None shows all.

    Raises:
        ConfigError: an unknown column, or a time that is not positive.
    """
    columns = [column for column, _, _ in _COLUMNS]
    if sort not in columns:
        raise ConfigError(f"task.sort={sort}: write one of {', '.join(columns)}")
    if seconds <= 0:
        raise ConfigError(f"task.seconds={seconds}: write a time in seconds, such as 2")
    watcher = Watcher([runs] if isinstance(runs, str) else list(runs))

    def look() -> list[Line]:
        limit = math.inf if hours is None else hours * 3600
        lines = [x for x in watcher.look() if x.status in _FIRST or x.age <= limit]
        return sorted(lines, key=lambda line: _key(line, sort))

    console = Console()
    if once or not console.is_terminal:
        lines = look()
        width = console.width if console.is_terminal else 200
        Console(width=width, highlight=False).print(table(lines, watcher.folders, width))
        return
    with suppress(KeyboardInterrupt), Live(console=console, screen=False) as live:
        while True:
            shown = table(look(), watcher.folders, console.width, console.height)
            live.update(shown, refresh=True)
            time.sleep(seconds)


def _key(line: Line, sort: str) -> tuple[bool, bool, Any]:
    value = getattr(line, sort)
    return line.status not in _FIRST, value is None, 0 if value is None else value


def table(
    lines: Sequence[Line], folders: Sequence[str], width: int, height: int | None = None
) -> Table | Text:
    """Return the runs as a table that fits a terminal.

    Args:
        lines: the runs in their order; those that do not fit are counted.
        folders: named where there is no run.
        width: columns of the terminal.
        height: rows of the terminal; None shows all.
    """
    if not lines:
        return Text(f"no run below {', '.join(map(str, folders))}")
    room = len(lines) if height is None else max(height - 5, 1)
    counts = Counter(line.status for line in lines)
    caption = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    if len(lines) > room:
        caption += f"; {len(lines) - room} more do not fit"
    columns = [(name, heading) for name, heading, least in _COLUMNS if width >= least]
    made = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    for name, heading in columns:
        text = name in ("name", "status")
        made.add_column(
            heading,
            justify="left" if text else "right",
            no_wrap=True,
            overflow="ellipsis" if name == "name" else "fold",
        )
    # The end of a name tells runs apart.
    space = max(width - (22 if width < 50 else 60 if width < 96 else 82), 12)
    for line in lines[:room]:
        made.add_row(*(_cell(line, name, space) for name, _ in columns))
    return made


def _cell(line: Line, column: str, space: int) -> Text:
    value = getattr(line, column)
    if column == "name":
        return Text(value if len(value) <= space else "…" + value[1 - space :])
    if column == "status":
        return Text(value, style=_COLORS.get(value, "bold red"))
    if column == "step" and line.max_steps and line.max_steps != value:
        return Text(f"{number(value)}/{number(line.max_steps)}")
    return Text(clock(value) if column in ("eta", "age") else number(value))
