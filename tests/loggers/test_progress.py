"""What a person sees of a training: on a terminal, in a file, and between other output."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from ditty_di.console import Console
from ditty_di.loggers import ProgressBar
from tests.toy import REPOSITORY

REPORT = {
    "loss": 2.34567,
    "lr": 3e-4,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "mfu": 0.411,
    "eta_seconds": 3725.0,
    "memory_gib": 1.0,
}
LINE = (
    "step 10/200  loss 2.3457  lr 3.00e-04  grad norm 0.500  tokens/s 12,346  MFU 41.1%  "
    "memory 1.00 GiB  ETA 1:02:05"
)


def test_without_a_terminal_each_report_is_one_line():
    file = io.StringIO()
    bar = ProgressBar(file)
    bar.write(1, {"loss": 1.0})  # not started: another rank
    bar.start(step=0, max_steps=200)
    bar.write(10, REPORT)
    bar.write(10, {"validation/loss": 2.5})
    bar.write(10, {f"blocks/{i}/grad_norm": float(i) for i in range(20)})
    bar.text(10, "sample/0", "Once upon")
    bar.close()
    assert file.getvalue().splitlines() == [
        LINE,
        "step 10/200  validation/loss 2.5000",
        "step 10/200  blocks/0/grad_norm 0.0000  blocks/1/grad_norm 1.0000  "
        "blocks/2/grad_norm 2.0000  blocks/3/grad_norm 3.0000  and 16 more",
        "step 10  sample/0: Once upon",
    ]


class Terminal:
    """A pseudo-terminal that is read while it is written to."""

    def __init__(self, columns, rows=24):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.file = os.fdopen(theirs, "w", encoding="utf-8")
        self.size, self.shown = (columns, rows), b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the other side is closed, and all of it has been read
            while chunk := os.read(self.ours, 1 << 16):
                self.shown += chunk

    def close(self):
        self.file.close()
        self._reader.join(10)
        os.close(self.ours)
        return self.shown.decode()

    def screen(self):
        """The lines that a person sees in the end."""
        pyte = pytest.importorskip("pyte")
        screen = pyte.Screen(*self.size)
        pyte.Stream(screen).feed(self.close())
        return [line.rstrip() for line in screen.display if line.strip()]


def test_on_a_terminal_the_bar_stays_below_what_is_printed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(columns=120)
    bar = ProgressBar(terminal.file, eval_interval=8, save_interval=50)
    bar.start(step=5, max_steps=200)
    bar.write(10, REPORT)
    bar.text(10, "sample/0", "Once upon")
    bar.write(20, REPORT | {"loss": 1.25})
    bar.write(20, {"validation/loss": 2.5})
    bar.write(190, REPORT)
    bar.close()
    above, validation, top, *fields = terminal.screen()
    assert top.startswith("━")
    assert above == "step 10  sample/0: Once upon"
    assert validation == "step 20/200  validation/loss 2.5000"
    assert top.endswith("95%  190/200 ETA 1:02:05")
    assert fields == [
        "loss 2.3457  lr 3.00e-04  grad norm 0.500  tokens/s 12,346  MFU 41.1%  memory 1.00 GiB  "
        "next validation 192",
        "next save 200",
    ]


def test_a_narrow_terminal_breaks_between_two_fields(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(columns=32)
    bar = ProgressBar(terminal.file)
    bar.start(step=0, max_steps=200)
    bar.write(10, REPORT)
    bar.write(20, REPORT)
    bar.close()
    top, *fields = terminal.screen()
    assert top.endswith("10%  20/200 ETA 1:02:05")
    assert fields == [
        "loss 2.3457  lr 3.00e-04",
        "grad norm 0.500  tokens/s 12,346",
        "MFU 41.1%  memory 1.00 GiB",
    ]


@pytest.mark.parametrize(("columns", "term"), [(0, "xterm"), (80, "dumb")])
def test_a_terminal_on_which_nothing_can_be_redrawn_gets_lines(columns, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    terminal = Terminal(columns)
    bar = ProgressBar(terminal.file)
    bar.start(step=0, max_steps=200)
    bar.write(10, REPORT)
    bar.close()
    assert terminal.close() == LINE + "\r\n"


def test_colors_follow_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    colored = []
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        terminal = Terminal(columns=100)
        bar = ProgressBar(terminal.file)
        bar.start(step=0, max_steps=20)
        bar.write(10, REPORT)
        bar.close()
        colored.append("[38;5;" in terminal.close())
    assert colored == [True, False]


def test_log_lines_appear_above_the_bar_and_the_log_file_has_no_control_codes(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("DITTY_DI_QUIET", raising=False)
    terminal = Terminal(columns=100)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    monkeypatch.setattr(sys, "stdout", terminal.file)
    log = tmp_path / "rank-0.log"
    with Console(log):
        bar = ProgressBar()
        bar.start(step=0, max_steps=200)
        bar.write(10, REPORT)
        logging.getLogger("ditty_di.test").warning("step 11 is not finite")
        print("printed", end="")
        print(" in two pieces")
        bar.write(20, REPORT)
        bar.close()
        print("the end")
    assert log.read_text().splitlines() == [
        LINE,
        "step 11 is not finite",
        "printed in two pieces",
        LINE.replace("step 10", "step 20"),
        "the end",
    ]
    lines = terminal.screen()
    assert lines[:2] == ["step 11 is not finite", "printed in two pieces"]
    assert "10%  20/200 ETA 1:02:05" in lines[2] and lines[-1] == "the end"
    assert len([line for line in lines if "ETA" in line]) == 1, "the bar is drawn once"


@pytest.mark.slow
def test_a_whole_training_on_a_terminal(tmp_path):
    """The command itself: the terminal has the bar, the log file only lines."""
    terminal = Terminal(columns=110, rows=40)
    command = ["-m", "ditty_di", "max_steps=20", "data.seq_len=32", "export=null", "run=RUN"]
    more = ["validator.max_batches=1", "logger.log_interval=5", "data.sample_text=null"]
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, *command, *more],
        cwd=tmp_path,
        env={**os.environ, **env, "DITTY_DI_QUIET": "0"},
        stdin=terminal.file,
        stdout=terminal.file,
        stderr=terminal.file,
    )
    assert process.wait(120) == 0, terminal.close()
    time.sleep(0.1)
    lines = terminal.screen()
    assert len([line for line in lines if "20/20" in line and "%" in line]) == 1, lines
    assert any("validation/loss" in line for line in lines)
    log = (tmp_path / "RUN" / "logs" / "rank-0.log").read_text()
    assert "step 20/20  loss " in log and "\x1b" not in log and "\r" not in log
