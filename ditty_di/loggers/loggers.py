"""Loggers that write files: JSON lines and TensorBoard.

Each is started on rank 0 only (see `ditty_di.loggers.Logger`), and touches no file before that.
"""

from __future__ import annotations

import json
import math
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
            raise ImportError(missing("TensorBoard", "tensorboard")) from error
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


def missing(logger: str, package: str) -> str:
    """Return what to do about a logger whose package is not installed.

    Args:
        logger: its class.
        package: what it needs.
    """
    return (
        f"the {logger} logger needs {package}: pip install {package}, or take the logger "
        f"out of logger.loggers"
    )
