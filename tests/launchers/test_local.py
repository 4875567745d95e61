"""Several ranks on this machine: real processes, under torch.distributed.run."""

import signal
import time
from pathlib import Path

import pytest

from ditty_di.launchers import Local
from ditty_di.launchers.local import gpu_count
from tests.toy import Folder, gone, result, wait_for

TWO = "launcher.nproc=2"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_two_ranks_share_a_directory_and_rank_0_has_the_console(folder: Folder) -> None:
    out, err = folder(TWO, "task=finish", "run=mine")
    assert out.count("rank 0 says 1.0") == 1 and "rank 1" not in out
    assert err == ""
    logs = folder.path / "mine/logs"
    assert "rank 0 says 1.0" in (logs / "rank-0.log").read_text()
    assert "rank 1 says 1.0" in (logs / "rank-1.log").read_text()
    assert result(folder.path / "mine")["status"] == "finished"


def test_a_rank_that_raises_ends_the_others_in_their_collective(folder: Folder) -> None:
    began = time.monotonic()
    _, err = folder(folder.task("collective", fails_on=1), TWO, "run=mine", code=1)
    assert time.monotonic() - began < 60
    assert "this rank cannot go on" in err and err.count("failed") == 1
    assert "Traceback" not in err and "torch" not in err
    said = result(folder.path / "mine")
    assert (said["status"], said["rank"]) == ("failed", 1)


def test_a_rank_that_vanishes_is_named(folder: Folder) -> None:
    _, err = folder(folder.task("die", on_rank=1), TWO, "run=mine", code=1)
    assert "rank 1 ended with exit code 3" in err
    assert result(folder.path / "mine")["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_ranks_in_good_order(folder: Folder, number: int) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    process = folder.start(task, TWO, "run=mine")
    mine = folder.path / "mine"
    wait_for(mine / "ready-0", mine / "ready-1", process=process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "preempted" in out
    assert result(mine)["status"] == "preempted"
    assert not (mine / "stop").exists()


def test_a_second_signal_kills_every_rank(folder: Folder) -> None:
    process = folder.start(folder.task("never_stops", ready="${run}/ready"), TWO, "run=mine")
    mine = folder.path / "mine"
    wait_for(mine / "ready-0", mine / "ready-1", process=process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not stop when asked" in err
    assert all(gone(int((mine / f"ready-{rank}").read_text())) for rank in (0, 1))
    assert result(mine)["status"] == "failed"


def test_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_count() == 0
    with pytest.raises(ValueError, match="nproc=0"):
        Local(nproc=0)


def test_a_signal_before_the_training_loop_ends_a_single_rank(folder: Folder) -> None:
    process = folder.start(folder.task("never_stops", ready="${run}/ready"), "run=mine")
    wait_for(folder.path / "mine/ready-0", process=process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("interrupted: ") and "Traceback" not in err
    assert result(folder.path / "mine")["status"] == "interrupted"
