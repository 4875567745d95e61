"""What the loggers leave behind, also after a resume."""

import json
import math
import sys

import pytest

from ditty_di.loggers import JSONLines, TensorBoard


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


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="needs tensorboard: pip install tensorboard, or take"):
        TensorBoard("x").start(step=0, max_steps=1)
