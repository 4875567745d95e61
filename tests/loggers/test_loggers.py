"""What the loggers leave behind, also after a resume."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import struct
import sys
import termios

import pytest

from ditty_di.loggers import JSONLines, ProgressBar, TensorBoard, WandB


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(logger, steps, start=0):
    logger.start(step=start, max_steps=10)
    for step in steps:
        logger.write(step, {"loss": float(step)})
    logger.close()


def test_jsonl_is_readable_while_the_run_goes_on(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    logger = JSONLines(str(path))
    assert not path.parent.exists(), "building a logger touches nothing"
    logger.start(step=0, max_steps=3)
    logger.write(1, {"loss": 2.5})
    logger.text(1, "sample", "zwei\nZeilen é")
    assert lines(path) == [
        {"step": 1, "loss": 2.5},
        {"step": 1, "name": "sample", "text": "zwei\nZeilen é"},
    ]
    logger.write(2, {"loss": math.nan, "grad_norm": math.inf})
    assert lines(path)[-1] == {"step": 2, "loss": None, "grad_norm": None}
    logger.close()
    logger.close()


def test_jsonl_of_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(JSONLines(str(path)), [1, 2, 3, 4, 5])
    path.open("a").write('{"step": 3, "lo')  # killed while writing
    write(JSONLines(str(path)), [4, 5, 6], start=3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6]
    # No checkpoint was left: the run starts over.
    write(JSONLines(str(path)), [1, 2])
    assert [line["step"] for line in lines(path)] == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_of_a_resumed_run_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(TensorBoard(str(tmp_path)), [1, 2, 3, 4, 5])
    resumed = TensorBoard(str(tmp_path))
    resumed.start(step=3, max_steps=10)
    resumed.write(4, {"loss": 40.0})
    resumed.text(4, "sample", "a\nb")
    resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    text = events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"    a\n    b"


@pytest.mark.parametrize(
    ("logger", "module", "package"),
    [
        (TensorBoard("x"), "torch.utils.tensorboard", "tensorboard"),
        (WandB("x"), "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named(logger, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install {package}, or take"):
        logger.start(step=0, max_steps=1)


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for start in (0, 2):
        logger = WandB(str(tmp_path), project="test", mode="offline")
        logger.start(step=start, max_steps=4)
        logger.write(start + 1, {"loss": 1.0})
        logger.text(start + 1, "sample", "<b>")
        ids.append(logger._run.id)
        logger.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb-run-id.txt").read_text().strip()


REPORT = {
    "loss": 2.34567,
    "lr": 3e-4,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "eta_seconds": 3725.0,
    "memory_gib": 1.0,
}


def test_without_a_terminal_each_report_is_one_line():
    file = io.StringIO()
    bar = ProgressBar(file)
    bar.write(1, {"loss": 1.0})  # not started: another rank
    bar.start(step=0, max_steps=200)
    bar.write(10, REPORT)
    bar.write(10, {"validation/loss": 2.5})
    bar.text(10, "sample/0", "Once upon")
    bar.close()
    assert file.getvalue().splitlines() == [
        "step 10/200  loss 2.3457  lr 3.00e-04  grad norm 0.500  tokens/s 12,346  ETA 1:02:05",
        "step 10/200  validation/loss 2.5000",
        "step 10  sample/0: Once upon",
    ]


def on_a_terminal(columns):
    """What a progress bar draws on a pseudo-terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as file:
        bar = ProgressBar(file)
        bar.start(step=5, max_steps=20)
        bar.write(10, REPORT)
        bar.text(10, "sample/0", "Once upon")
        bar.write(20, REPORT)
        bar.close()
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed, and all of it has been read
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    return shown.decode()


def test_on_a_terminal_texts_stay_above_the_bar():
    shown = on_a_terminal(columns=120)
    assert "| 10/20, loss" in shown and "100%" in shown and "loss 2.3457" in shown
    assert "ETA 1:02:05" in shown
    assert "step 10  sample/0: Once upon\r\n" in shown
    # Some pseudo-terminals have no width, and a bar would not be seen.
    assert "step 10/20  loss 2.3457" in on_a_terminal(columns=0)
