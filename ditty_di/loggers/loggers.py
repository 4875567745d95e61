"""Loggers: JSON lines, TensorBoard, Weights & Biases, the console.

Each is started on rank 0 only (see `ditty_di.loggers.Logger`), and touches no file before that.
"""

from __future__ import annotations

import html
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ditty_di.io import json_value, replacing


class JSONLines:
    """One JSON object a line: `{"step": ..., name: value, ...}` or `{"step", "name", "text"}`.

    A line is handed to the operating system when `write` returns. A resumed run first drops the
    lines after the restored step, and a half-written last one. NaN and infinity become null, as
    JSON has neither.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def start(self, *, step: int, max_steps: int) -> None:
        """Open the file and drop the lines after a step.

        Args:
            step: the restored step, 0 in a new run.
            max_steps: ignored.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in self.path.read_bytes().splitlines() if _step_of(line) <= step]
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line of values.

        Args:
            step: optimizer step.
            values: by name.
        """
        self._line({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        """Append a line with a text.

        Args:
            step: optimizer step.
            name: of the text.
            text: its content.
        """
        self._line({"step": step, "name": name, "text": text})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, entry: dict[str, Any]) -> None:
        assert self._file is not None, "not started"
        self._file.write(json.dumps(json_value(entry), ensure_ascii=False) + "\n")
        self._file.flush()


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity for a line that a killed process left half-written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Scalars and texts for TensorBoard (`tensorboard --logdir FOLDER`).

    Args:
        folder: the folder of event files.
        flush_seconds: time in seconds between two flushes to disk.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str, flush_seconds: int = 30) -> None:
        self.folder = folder
        self.flush_seconds = flush_seconds
        self._writer: Any = None

    def start(self, *, step: int, max_steps: int) -> None:
        """Open an event file that hides earlier events after a step.

        Args:
            step: the restored step, 0 in a new run.
            max_steps: ignored.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(_missing("TensorBoard")) from error
        self._writer = SummaryWriter(
            self.folder, purge_step=step + 1, flush_secs=self.flush_seconds
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add scalars.

        Args:
            step: optimizer step.
            values: by name.
        """
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text.

        Args:
            step: optimizer step.
            name: of the text.
            text: its content.
        """
        # Indented by four, Markdown (which TensorBoard renders) shows it unchanged.
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """Weights & Biases. The x axis is the metric `step`.

    Args:
        folder: receives wandb's files and `wandb-run-id.txt`: a run that is resumed in the same
            folder continues the same W&B run.
        **init: passed to `wandb.init` (project, mode, tags, config, ...).

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: str, **init: Any) -> None:
        self.folder = Path(folder)
        self.init = init
        self._run: Any = None

    def start(self, *, step: int, max_steps: int) -> None:
        """Start or continue the W&B run.

        Args:
            step: ignored.
            max_steps: ignored.
        """
        try:
            import wandb
        except ImportError as error:
            raise ImportError(_missing("WandB")) from error
        self.folder.mkdir(parents=True, exist_ok=True)
        id_file = self.folder / "wandb-run-id.txt"
        known = id_file.read_text().strip() if id_file.exists() else None
        resumed = {"id": known, "resume": "allow"} if known else {}
        self._run = wandb.init(**{"dir": str(self.folder), **resumed, **self.init})
        # W&B's own step cannot go back to a restored step; a metric can.
        self._run.define_metric("*", step_metric="step")
        if known is None:
            id_file.write_text(self._run.id + "\n")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values.

        Args:
            step: optimizer step.
            values: by name.
        """
        self._run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text as preformatted HTML.

        Args:
            step: optimizer step.
            name: of the text.
            text: its content.
        """
        import wandb

        self._run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _missing(logger: str) -> str:
    package = logger.lower()
    return (
        f"the {logger} logger needs {package}: pip install {package}, or take the logger "
        f"out of logger.loggers"
    )


class ProgressBar:
    """A progress bar on a terminal; elsewhere (a file, a pipe) one line for each report.

    Args:
        file: where to write; None means standard error, so that results on standard output stay
            separate.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self._bar: Any = None
        self._print: Callable[[str], None] = lambda line: None
        self._max_steps = 0

    def start(self, *, step: int, max_steps: int) -> None:
        """Show the bar.

        Args:
            step: the restored step, 0 in a new run.
            max_steps: the last step.
        """
        file = self.file or sys.stderr
        self._max_steps = max_steps
        if _columns(file):
            from tqdm import tqdm

            self._bar = tqdm(
                total=max_steps,
                initial=step,
                file=file,
                dynamic_ncols=True,
                # Its own estimate would count validation as training.
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
            self._print = lambda line: self._bar.write(line, file=file)
        else:
            self._print = lambda line: print(line, file=file, flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Show values: in the bar those of a training step, others above it.

        Args:
            step: optimizer step.
            values: by name.
        """
        shown = _describe(values)
        if self._bar is None:
            self._print(f"step {step}/{self._max_steps}  {shown}")
        elif "eta_seconds" in values:
            self._bar.n = step
            self._bar.set_postfix_str(shown.replace("  ", " "))
        else:
            self._print(f"step {step}  {shown}")

    def text(self, step: int, name: str, text: str) -> None:
        """Print a text above the bar.

        Args:
            step: optimizer step.
            name: of the text.
            text: its content.
        """
        self._print(f"step {step}  {name}: {text}")

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._print = lambda line: None


def _columns(file: TextIO) -> int:
    """Return the width of the terminal behind a file, 0 without one or without a width."""
    try:
        return os.get_terminal_size(file.fileno()).columns if file.isatty() else 0
    except (OSError, ValueError):
        return 0


_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4f}".format),
    "lr": ("lr", "{:.2e}".format),
    "grad_norm": ("grad norm", "{:.3f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "eta_seconds": ("ETA", lambda seconds: _clock(seconds)),
}


def _describe(values: dict[str, float]) -> str:
    """Return the values that a person watches; without any of these, all values."""
    known = [f"{label} {show(values[k])}" for k, (label, show) in _SHOWN.items() if k in values]
    return "  ".join(known or [f"{name} {value:.4f}" for name, value in values.items()])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
