"""The progress of a training on the console."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from ditty_di.console import Tee


class ProgressBar:
    """Progress at the bottom of a terminal; elsewhere (a file, a pipe) one line for each report.

    The log file of a rank gets the lines in both cases. Colors follow `NO_COLOR`; a terminal
    without cursor movement (`TERM=dumb`) gets lines.

    Args:
        file: where to write; None means standard error, so that results on standard output stay
            separate.
        eval_interval: optimizer steps between validations, to show the next one; None without.
        save_interval: optimizer steps between checkpoints, likewise.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        eval_interval: int | None = None,
        save_interval: int | None = None,
    ) -> None:
        self.file = file
        self._intervals = {"next validation": eval_interval, "next save": save_interval}
        self._display: _Display | None = None
        self._print: Callable[[str], None] = lambda line: None
        self._max_steps = 0

    def start(self, *, step: int, max_steps: int) -> None:
        """Show the bar.

        Args:
            step: the restored step, 0 in a new run.
            max_steps: the last step.
        """
        file: Any = self.file or sys.stderr
        self._max_steps = max_steps
        terminal = file.console if isinstance(file, Tee) else file
        if terminal is not None and _columns(terminal):
            self._display = _Display(terminal, max_steps)
            self._display.update(step, self._next(step))

            def above(line: str) -> None:
                assert self._display is not None
                self._display.print_above(line)
                self._log(line)

            self._print = above
        else:
            self._print = lambda line: print(line, file=file, flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Show values: in the bar those of a training step, others above it.

        Args:
            step: optimizer step.
            values: by name.
        """
        fields, training = _fields(values), "eta_seconds" in values
        emit = self._print
        if self._display is not None and training:
            self._display.update(step, fields | self._next(step))
            emit = self._log
        shown = [f"{label} {value}" for label, value in fields.items()]
        if len(shown) > _MOST:  # of blocks, sources or ranks
            shown = [*shown[:4], f"and {len(shown) - 4} more"]
        line = "  ".join(shown)
        emit(f"step {step}/{self._max_steps}  {line}")

    def text(self, step: int, name: str, text: str) -> None:
        """Print a text above the bar.

        Args:
            step: optimizer step.
            name: of the text.
            text: its content.
        """
        self._print(f"step {step}  {name}: {text}")

    def close(self) -> None:
        """Leave the bar as it is, and write below it from now on."""
        if self._display is not None:
            self._display.close()
            self._display = None
        self._print = lambda line: None

    def _log(self, line: str) -> None:
        """Write a line that the terminal does not need to the log file of this rank."""
        file = self.file or sys.stderr
        if isinstance(file, Tee):
            file.log(line + "\n")

    def _next(self, step: int) -> dict[str, str]:
        """Return the next multiple of each interval, as fields of the bar."""
        found = {k: step - step % n + n for k, n in self._intervals.items() if n}
        return {k: str(at) for k, at in found.items() if at <= self._max_steps}


class _Display:
    """A bar and fields at the bottom of a terminal, redrawn at each report.

    Nothing is drawn in between, so there is no thread, and what other code writes to standard
    output and error appears above.
    """

    def __init__(self, terminal: TextIO, max_steps: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._terminal, self._max_steps = terminal, max_steps
        self._console = Console(file=terminal, highlight=False, markup=False, emoji=False)
        self._fit()
        # Ranks write through `Tee`, which also has their log file.
        plain = not isinstance(sys.stderr, Tee)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=plain,
            redirect_stderr=plain,
            vertical_overflow="crop",
        )
        self._live.start()
        self._console.show_cursor(True)  # a process that is killed would leave it hidden
        Tee.print_above = self.print_above

    def update(self, step: int, fields: dict[str, str]) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Table
        from rich.text import Text

        self._fit()
        top = Table.grid(padding=(0, 1))
        done = f"{step / max(self._max_steps, 1):.0%}  {step}/{self._max_steps}"
        left = f"ETA {fields.pop('ETA')}" if "ETA" in fields else ""
        width = min(40, self._console.width - len(done) - len(left) - 3)
        bar = [Bar(total=max(self._max_steps, 1), completed=step, width=width)] * (width > 3)
        top.add_row(*bar, Text(done, no_wrap=True), Text(left, no_wrap=True))
        lines = [""]  # broken between two fields, not within one
        for field in (f"{k} {v}" for k, v in fields.items()):
            longer = f"{lines[-1]}  {field}".lstrip()
            fits = len(longer) <= self._console.width or not lines[-1]
            lines[-1:] = [longer] if fits else [lines[-1], field]
        below = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line]
        self._live.update(Group(top, *below), refresh=True)

    def print_above(self, line: str) -> None:
        from rich.text import Text

        self._fit()
        self._console.print(Text.from_ansi(line), soft_wrap=True)

    def close(self) -> None:
        Tee.print_above = None
        self._live.stop()

    def _fit(self) -> None:
        """Take the present width of the terminal, which rich looks up for standard streams only."""
        size = os.get_terminal_size(self._terminal.fileno())
        self._console.size = (size.columns or 80, size.lines or 24)  # type: ignore[assignment]


def _columns(file: TextIO) -> int:
    """Return the width of the terminal behind a file; 0 for none, or one that only takes lines."""
    try:
        plain = os.environ.get("TERM") in ("dumb", "unknown") or not file.isatty()
        return 0 if plain else os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):
        return 0


#: Values of a line that are all shown.
_MOST = 12
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4f}".format),
    "lr": ("lr", "{:.2e}".format),
    "grad_norm": ("grad norm", "{:.3f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "memory_gib": ("memory", "{:.2f} GiB".format),
    "eta_seconds": ("ETA", lambda seconds: _clock(seconds)),
}


def _fields(values: dict[str, float]) -> dict[str, str]:
    """Return the values that a person watches, by label; without any of these, all values."""
    known = {label: show(values[k]) for k, (label, show) in _SHOWN.items() if k in values}
    return known or {name: f"{value:.4f}" for name, value in values.items()}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
