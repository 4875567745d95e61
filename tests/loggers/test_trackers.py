"""A run that was killed goes on with the same curve: no step twice, none lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys

import pytest

from ditty_di.loggers import MLflow, Trackio, WandB
from tests.toy import REPOSITORY

_BLOCK = 1 << 15
#: Logs steps; is killed, or ends, behind the last one.
PROGRAM = """
import os, signal, sys, time
from ditty_di.loggers import MLflow, Trackio, WandB

folder, name, first, last, kill = sys.argv[1:]
made = {
    "wandb": lambda: WandB(folder, project="test", mode="offline"),
    "mlflow": lambda: MLflow(folder, tracking_uri=f"sqlite:///{folder}/store.db", name="mine"),
    "trackio": lambda: Trackio(folder, project="test", name="mine"),
}
logger = made[name]()
logger.start(step=int(first) - 1, max_steps=9)
for step in range(int(first), int(last) + 1):
    logger.write(step, {"loss": float(step), "lr": 0.5})
    if step % 2 == 0:
        logger.write(step, {"validation/loss": 10.0 * step})
        logger.text(step, "sample", f"<b> of {step}")
if kill == "kill":
    time.sleep(3)  # they write from threads and processes of their own
    os.kill(os.getpid(), signal.SIGKILL)
logger.close()
"""


def run(folder, *arguments, kill=False):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, *map(str, arguments), "kill" if kill else "end"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "TRACKIO_DIR": str(folder / "trackio"),
            "WANDB_SILENT": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stdout + done.stderr


def of_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/store.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "ditty_di"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in ("loss", "validation/loss")
    }


def of_trackio(folder):
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json; from trackio.sqlite_storage import SQLiteStorage as s\n"
            "(name,) = s.get_runs('test'); print(json.dumps(s.get_logs('test', name)))",
        ],
        env={**os.environ, "TRACKIO_DIR": str(folder / "trackio")},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout.splitlines()[-1])
    return {
        name: [(row["step"], row[name]) for row in rows if name in row]
        for name in ("loss", "validation/loss")
    }


def records(file):
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if left < 7 or kind == 0:  # the rest of a block is filled with zeros
            at += left
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def of_wandb(folder):
    """What `wandb sync` would send of all starts of the run, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    assert len(ids) == 1
    return {
        name: [(row["step"], row[name]) for row in rows if name in row]
        for name in ("loss", "validation/loss")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"), [("mlflow", of_mlflow), ("trackio", of_trackio), ("wandb", of_wandb)]
)
def test_a_killed_run_goes_on_with_the_same_curve(name, found, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    run(tmp_path, name, 1, 5, kill=True)
    run(tmp_path, name, 4, 7)  # from a checkpoint of step 3
    assert found(tmp_path) == {
        "loss": [(step, float(step)) for step in range(1, 8)],
        "validation/loss": [(step, 10.0 * step) for step in (2, 4, 6)],
    }


@pytest.mark.parametrize("kind", [WandB, MLflow, Trackio])
def test_a_missing_package_is_named(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, kind.package, None)
    message = f"needs {kind.package}: pip install {kind.package}, or take the logger out"
    with pytest.raises(ValueError, match=message):
        kind.validate()
    with pytest.raises(ImportError, match=message):
        kind(str(tmp_path / "run")).start(step=0, max_steps=1)
    assert not (tmp_path / "run").exists()


def test_a_subclass_keeps_its_own_validate():
    def mine() -> None: ...

    assert type("Own", (WandB,), {"validate": staticmethod(mine)}).validate is mine
