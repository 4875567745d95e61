"""On a real Ray, started on this machine."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import warm
from tests.toy import REPOSITORY, Folder, result

pytest.importorskip("ray.train.torch", reason="needs the extra [ray]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--block", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats")
    command = [Path(sys.executable).with_name("ray"), "start", "--head", f"--port={port}", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise another Ray here may have a token
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        head = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert any("Ray runtime started" in line for line in head.stdout)
        yield f"127.0.0.1:{port}"
    # Asked to end, it waits for half a minute.
    for process in (*psutil.Process(head.pid).children(recursive=True), head):
        process.kill()
    head.communicate(timeout=60)


def test_two_ranks_train_as_workers_of_ray(address: str, tmp_path: Path) -> None:
    small = (
        *("data=debug", "parallelize=ddp", "max_steps=2", "model.config.num_hidden_layers=1"),
        *("validator=none", "export=none", "run=mine", "launcher.nproc=2"),
    )
    launcher = ("launcher=ray", f"launcher.address={address}")
    out = warm.ditty_di(tmp_path, "+experiment=pretrain", *small, *launcher)
    run = tmp_path / "mine"
    assert result(run)["status"] == "finished" and "finished, step 2" in out
    assert {file.name for file in run.glob("logs/*")} == {"rank-0.log", "rank-1.log"}
    assert "step 2/2" in (run / "logs/rank-0.log").read_text()
    assert [file.name for file in run.glob("checkpoints/step-*")] == ["step-00000002"]


def test_a_failing_rank_is_named_and_ranks_are_started_again(address: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    launcher = ("launcher=ray", f"launcher.address={address}", "launcher.nproc=2")
    _, err = folder(*launcher, "task.bad=1.0", "run=mine", "launcher.max_restarts=1", code=1)
    assert re.search(r"failed: rank \d: task: RuntimeError: 1.0 is a bad value", err), err
    assert "is a bad value" in result(tmp_path / "mine")["error"]
    log = (tmp_path / "mine/logs/rank-1.log").read_text()
    assert log.count("RuntimeError: 1.0 is a bad value") >= 2  # of both starts
