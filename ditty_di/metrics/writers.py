"""Where metrics go: one small class each, all of them quiet until `start` (see `Writer`)."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable


class JSONLines:
    """One JSON object a line: `{"step": ..., name: value, ...}` or `{"step", "name", "text"}`.

    A line is on its way to the disk when `write` returns. A resumed run first drops the lines
    after the restored step, and a half-written last one. Values that are not finite become null,
    which JSON has no other word for.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def start(self, *, step: int, total_steps: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._drop_after(step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._line({"step": step, **finite})

    def text(self, step: int, name: str, text: str) -> None:
        self._line({"step": step, "name": name, "text": text})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()

    def _drop_after(self, step: int) -> None:
        kept = [line for line in self.path.read_bytes().splitlines() if _step_of(line) <= step]
        aside = self.path.with_name(self.path.name + ".new")
        aside.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(aside, self.path)


def _step_of(line: bytes) -> float:
    """The step of one line; infinity for a line that a killed process left half written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Scalars and texts for TensorBoard (`tensorboard --logdir FOLDER`).

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str, flush_seconds: int = 30) -> None:
        self.folder = folder
        self.flush_seconds = flush_seconds
        self._writer: Any = None

    def start(self, *, step: int, total_steps: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "the TensorBoard metrics writer needs tensorboard: pip install tensorboard, or "
                "take the writer out of metrics.writers"
            ) from error
        self._writer = SummaryWriter(
            self.folder, purge_step=step + 1, flush_secs=self.flush_seconds
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        if self._writer is not None:
            # Indented by four, Markdown (which TensorBoard renders) shows it as it is.
            self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """Weights & Biases. `init` goes to `wandb.init` as it is (project, mode, tags, config, ...).

    `folder` receives wandb's files and `wandb-run-id.txt`: a run that is resumed in the same
    folder continues the same W&B run. The x axis is the metric `step`.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: str, **init: Any) -> None:
        self.folder = Path(folder)
        self.init = init
        self._run: Any = None

    def start(self, *, step: int, total_steps: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "the WandB metrics writer needs wandb: pip install wandb, or take the writer out "
                "of metrics.writers"
            ) from error
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
        if self._run is not None:
            self._run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        if self._run is not None:
            import html

            import wandb

            self._run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class ProgressBar:
    """A bar on a terminal; elsewhere (a file, a pipe) one line a report. Texts go above the bar.

    `file`: None writes to standard error, so that results on standard output stay apart.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self._bar: Any = None
        self._print: Callable[[str], None] | None = None
        self._total_steps = 0

    def start(self, *, step: int, total_steps: int) -> None:
        file = self.file or sys.stderr
        self._total_steps = total_steps
        if _columns(file):
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=step,
                file=file,
                dynamic_ncols=True,
                # Its own estimate would count validation as training.
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
            self._print = self._above_bar
        else:
            self._print = lambda line: print(line, file=file, flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._print is None:
            return
        shown = _describe(values)
        if self._bar is None:
            self._print(f"step {step}/{self._total_steps}  {shown}")
        elif "eta_seconds" in values:
            self._bar.n = step
            self._bar.set_postfix_str(shown.replace("  ", " "))
        else:
            self._above_bar(f"step {step}  {shown}")

    def text(self, step: int, name: str, text: str) -> None:
        if self._print is not None:
            self._print(f"step {step}  {name}: {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._print = None

    def _above_bar(self, line: str) -> None:
        self._bar.write(line, file=self.file or sys.stderr)


def _columns(file: TextIO) -> int:
    """Width of the terminal that `file` is; 0 when it is none, or has no width to draw in."""
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
    """The few values that a person watches; of a report without any of these, all."""
    known = [f"{label} {show(values[k])}" for k, (label, show) in _SHOWN.items() if k in values]
    return "  ".join(known or [f"{name} {value:.4f}" for name, value in values.items()])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
