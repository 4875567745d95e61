"""Write a rank's standard output and error to the console and to its log file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TextIO, cast

#: Set for ranks whose failures are reported, and whose signals are answered, by a launcher.
LAUNCHED = "DITTY_DI_LAUNCHED"

#: Environment variable: "1" keeps what ranks print in their log files. A sweep sets it for its
#: jobs, unless the user has.
QUIET = "DITTY_DI_QUIET"


def quiet() -> bool:
    """Return whether ranks print to their log files only."""
    return os.environ.get(QUIET, "0") not in ("", "0")


def status(line: str) -> None:
    """Print progress to standard error before there is a log, unless `quiet`."""
    if not quiet():
        print(line, file=sys.stderr, flush=True)


class Console:
    """Copy what Python prints to a log file while the console is open.

    Log records of `ditty_di` from INFO on, and of other libraries from WARNING on, are printed.

    Args:
        log: the log file; it is appended to.
        show: False prints to the log file only.
    """

    def __init__(self, log: Path, show: bool = True) -> None:
        self._path = log
        self._show = show and not quiet()

    def __enter__(self) -> Console:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.log = self._path.open("a", encoding="utf-8", buffering=1)
        self._before = sys.stdout, sys.stderr
        self._tees = [Tee(stream if self._show else None, self.log) for stream in self._before]
        sys.stdout, sys.stderr = (cast("TextIO", tee) for tee in self._tees)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root = logging.getLogger()
        own = logging.getLogger("ditty_di")
        self._logging = root.handlers, root.level, own.level
        root.handlers = [handler]  # Hydra's would print everything a second time
        root.setLevel(logging.WARNING)
        own.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        root = logging.getLogger()
        root.handlers, level, own = self._logging
        root.setLevel(level)
        logging.getLogger("ditty_di").setLevel(own)
        sys.stdout, sys.stderr = self._before
        for tee in self._tees:
            tee.detach()
        with contextlib.suppress(OSError):
            self.log.close()

    def log_only(self, text: str) -> None:
        """Write text to the log file and not to the console."""
        with contextlib.suppress(OSError):  # a full disk
            self.log.write(text)


class Tee:
    r"""Write text to a console and a file. The file gets a redrawn line (`\r`) once.

    A console that is gone (a closed terminal, a pipe without a reader) is left out from then on: it
    must not end a training.

    Args:
        console: the stream to show text on, or None.
        file: the log file, or None.
    """

    #: Prints a line above what is redrawn at the bottom of the terminal (a progress bar), while
    #: there is such a thing: text in between would be overwritten.
    print_above: ClassVar[Callable[[str], None] | None] = None

    def __init__(self, console: TextIO | None, file: TextIO | None) -> None:
        self.console = console
        self._file = file
        self._line = ""
        self._unfinished = ""

    def write(self, text: str) -> int:
        """Write text to both; return its length."""
        if self.console is not None:
            try:
                self._show(text)
            except OSError:
                self.console = None
        return self.log(text)

    def _show(self, text: str) -> None:
        assert self.console is not None
        above = Tee.print_above
        if above is None or not self.console.isatty():
            self.console.write(self._unfinished + text)
            self._unfinished = ""
            return
        *done, self._unfinished = (self._unfinished + text).split("\n")
        for line in done:
            above(_last_drawn(line))

    def log(self, text: str) -> int:
        """Write text to the file and not to the console; return its length."""
        if self._file is not None:
            *done, line = (self._line + text).split("\n")
            # A bar that is redrawn for hours never ends its line: only its last state matters.
            self._line = _last_drawn(line)
            try:
                self._file.writelines(_last_drawn(line) + "\n" for line in done)
            except OSError:  # such as a full disk, which must not stop the output
                self._file = None
        return len(text)

    def detach(self) -> None:
        """Release the file; a library that kept this stream can go on writing."""
        if self._file is not None and self._line:
            with contextlib.suppress(OSError):
                self._file.write(self._line + "\n")
        self._file = None

    def flush(self) -> None:
        """Flush the console."""
        if self.console is not None:
            try:
                self.console.flush()
            except OSError:
                self.console = None

    def isatty(self) -> bool:
        """Return whether the console is a terminal."""
        return self.console is not None and self.console.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console if self.console is not None else sys.__stdout__, name)


def _last_drawn(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


def quiet_imports() -> None:
    """Silence warnings of libraries at import that a user can do nothing about.

    torchao 0.18 and bitsandbytes 0.50 list kernels they did not load; peft 0.21 uses a deprecated
    name of transformers 5; botocore tells in each process where it found credentials.
    """
    for name in (
        "torchao",
        "torch.utils._pytree",
        "bitsandbytes.backends",
        "botocore",
        "aiobotocore",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
