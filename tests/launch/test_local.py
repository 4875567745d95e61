"""Several ranks on this machine: real processes, under torch.distributed.run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ditty_di.launch import Local
from ditty_di.launch.local import gpu_count
from tests.launch import chaos
from tests.toy import MODULE, REPOSITORY, Folder, gone, result, wait_for

TWO = "launcher.nproc=2"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def told(err: str) -> str:
    """Standard error without the line that says what a start is doing."""
    return "".join(line for line in err.splitlines(True) if not line.startswith("importing what "))


def test_two_ranks_share_a_directory_and_rank_0_has_the_console(folder: Folder) -> None:
    out, err = folder(TWO, "task=finish", "run=mine", command=MODULE)
    assert out.count("rank 0 says 1.0") == 1 and "rank 1" not in out
    assert told(err) == ""
    logs = folder.path / "mine/logs"
    assert "rank 0 says 1.0" in (logs / "rank-0.log").read_text()
    assert "rank 1 says 1.0" in (logs / "rank-1.log").read_text()
    assert result(folder.path / "mine")["status"] == "finished"


def test_a_dry_run_prints_the_plan_and_makes_nothing(folder: Folder) -> None:
    out, _ = folder(TWO, "task=finish", "run=mine", "launcher.dry_run=true")
    assert "start 2 ranks" in out and "in mine" in out and "rank 0 says" not in out
    assert not (folder.path / "mine").exists()


def test_a_rank_that_raises_ends_the_others_in_their_collective(folder: Folder) -> None:
    began = time.monotonic()
    _, err = folder(folder.task("collective", fails_on=1), TWO, "run=mine", code=1)
    assert time.monotonic() - began < 60
    assert "this rank cannot go on" in err and err.count("failed") == 1
    assert "Traceback" not in err and "torch" not in told(err)
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


def test_a_second_ctrl_c_kills_every_rank_and_says_what_is_left(folder: Folder) -> None:
    process = folder.start(folder.task("never_stops", ready="${run}/ready"), TWO, "run=mine")
    mine = folder.path / "mine"
    wait_for(mine / "ready-0", mine / "ready-1", process=process)
    (mine / "checkpoints/step-00000020").mkdir(parents=True)
    (mine / "checkpoints/step-00000020/manifest.json").touch()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    first, last = told(err).splitlines()[:2]
    assert first.endswith("and saving; press Ctrl-C again to quit without saving")
    assert last == "interrupted: quit without saving; the run goes on from step 20"
    assert all(gone(int((mine / f"ready-{rank}").read_text())) for rank in (0, 1))
    assert result(mine)["status"] == "interrupted"


def test_a_signal_that_comes_twice_is_one_request_and_the_grace_ends(folder: Folder) -> None:
    task = folder.task("never_stops", ready="${run}/ready")
    process = folder.start(task, TWO, "launcher.grace_seconds=3", "run=mine")
    mine = folder.path / "mine"
    wait_for(mine / "ready-0", mine / "ready-1", process=process)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.4)
        assert process.poll() is None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not stop when asked (SIGTERM), within launcher.grace_seconds=3" in err
    assert all(gone(int((mine / f"ready-{rank}").read_text())) for rank in (0, 1))
    assert result(mine)["status"] == "failed"


def test_starting_a_run_imports_no_torch() -> None:
    modules = "ditty_di.sweeps.parallel, ditty_di.launch.torchrun, ditty_di.launch.worker"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    assert told(err).startswith("interrupted: ") and "Traceback" not in err
    assert result(folder.path / "mine")["status"] == "interrupted"


def started(folder: Folder, task: str, nproc: int) -> Any:
    """A launched task whose ranks have said in `run=mine` that they are ready."""
    task = folder.task(task, ready="${run}/ready")
    process = folder.start(task, f"launcher.nproc={nproc}", "run=mine")
    ready = [folder.path / f"mine/ready-{rank}" for rank in range(nproc)]
    wait_for(*ready, process=process)
    time.sleep(0.2)  # until what is in the files is whole
    return process


def pids(run: Path, *ranks: int) -> list[int]:
    return [int(pid) for rank in ranks for pid in (run / f"ready-{rank}").read_text().split()]


@pytest.mark.parametrize("nproc", [1, 2])
def test_killing_the_launcher_leaves_nothing_behind(folder: Folder, nproc: int) -> None:
    process = started(folder, "forks", nproc)
    children = [pid for pid in pids(folder.path / "mine", *range(nproc)) if pid != process.pid]
    process.kill()
    process.wait()
    assert all(gone(pid, seconds=5) for pid in children)
    out, _ = folder("task=finish", "run=mine", "resume.allow=[task]")  # the folder is free
    assert "rank 0 says" in out


def test_killing_a_rank_ends_the_others_and_its_own_children(folder: Folder) -> None:
    process, mine = started(folder, "forks", 2), folder.path / "mine"
    children = pids(mine, 0, 1)
    os.kill(children[2], signal.SIGKILL)  # rank 1
    assert all(gone(pid, seconds=5) for pid in children)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "failed: rank 1 was killed (SIGKILL" in err
    assert result(mine)["rank"] == 1


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_to_every_process_and_again_is_a_preemption(folder: Folder, nproc: int) -> None:
    process, mine = started(folder, "until_asked", nproc), folder.path / "mine"
    everyone = {process.pid, *pids(mine, *range(nproc))}
    for _ in range(2):
        for pid in everyone:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.6)  # the second time the handlers of the training loop are gone
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert result(mine)["status"] == "preempted" and "preempted, step 7" in out


def test_sigterm_to_every_process_before_the_training_loop(folder: Folder) -> None:
    process = folder.start(folder.task("never_stops", ready="${run}/ready"), TWO, "run=mine")
    mine = folder.path / "mine"
    wait_for(mine / "ready-0", mine / "ready-1", process=process)
    time.sleep(0.2)
    for pid in (process.pid, *pids(mine, 0, 1)):
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "before it could save; no checkpoint exists" in err
    assert result(mine)["status"] == "interrupted"


def test_a_rank_that_hangs_is_named_with_the_place_where_it_is(folder: Folder) -> None:
    began = time.monotonic()
    _, err = folder(folder.task("hang", on_rank=1, seconds=3), TWO, "run=mine", code=1)
    assert time.monotonic() - began < 60
    assert "rank 1 did not reach the all_reduce that rank 0 waited for since 3 s; rank 1 " in err
    assert "was in toy_tasks.unreachable_disk (" in err and "memory" not in err
    assert result(folder.path / "mine")["hanging"] == [1]


# -- restarts -------------------------------------------------------------------------------------


def starts(run: Path) -> list[str]:
    """For each rank the world sizes that it was started with, one digit each."""
    return [file.read_text() for file in sorted(run.glob("starts-*"))]


@pytest.mark.parametrize(("nproc", "allowed", "code"), [(2, 2, 0), (1, 2, 0), (2, 1, 1)])
def test_after_a_rank_was_killed_all_start_again(
    folder: Folder, nproc: int, allowed: int, code: int
) -> None:
    task = folder.task("flaky", how="kill", times=2, starts="${run}/starts", on_rank=nproc - 1)
    options = (f"launcher.nproc={nproc}", f"launcher.max_restarts={allowed}", "run=mine")
    _, err = folder(task, *options, code=code)
    said = result(folder.path / "mine")
    assert starts(folder.path / "mine") == [str(nproc) * (allowed + 1)] * nproc
    lines = [line for line in err.splitlines() if line.startswith("restart ")]
    killed = f"rank {nproc - 1} was killed (SIGKILL"
    assert [line.split(": ")[0] for line in lines] == [
        f"restart {n + 1} of {allowed}, from the start" for n in range(allowed)
    ]
    assert all(killed in line for line in lines) and said["restarts"] == allowed
    if code:
        assert (said["status"], said["rank"]) == ("failed", 1)
        assert said["error"].endswith("; not restarted: launcher.max_restarts=1 is used up")
    else:
        assert said["status"] == "finished"


def test_an_exception_at_the_same_step_again_is_not_repeated(folder: Folder) -> None:
    task = folder.task("flaky", how="raise", times=9, starts="${run}/starts")
    _, err = folder(task, TWO, "launcher.max_restarts=5", "run=mine", code=1)
    assert "restart 1 of 5, from the start: rank 1, step 3: " in err
    assert "shard 7 is unreadable (" in err and "the same happened before the last restart" in err
    assert starts(folder.path / "mine")[1] == "22" and "restart 2" not in err
    assert result(folder.path / "mine")["restarts"] == 1


def test_what_cannot_be_built_is_not_started_again(folder: Folder) -> None:
    folder.write(
        "conf/task/broken.yaml",
        """
        _target_: tests.toy_tasks.read
        shard: {_target_: tests.toy_tasks.Broken, starts: "${run}/starts"}
        """,
    )
    _, err = folder("task=broken", TWO, "launcher.max_restarts=5", "run=mine", code=1)
    assert "rows=0: give at least one\n" in err and "\nnot restarted: it would fail again" in err
    assert set(starts(folder.path / "mine")) == {"2"} and "restart 1" not in err


@pytest.mark.parametrize("everyone", [False, True])
def test_what_was_asked_to_stop_is_not_started_again(folder: Folder, everyone: bool) -> None:
    task = "never_stops" if everyone else "until_asked"
    options = (folder.task(task, ready="${run}/ready"), TWO, "launcher.max_restarts=5", "run=mine")
    process = folder.start(*options)
    mine = folder.path / "mine"
    wait_for(mine / "ready-0", mine / "ready-1", process=process)
    time.sleep(0.2)
    for pid in (process.pid, *pids(mine, 0, 1)):
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if everyone else 0), err
    said = result(mine)
    assert said["status"] == ("interrupted" if everyone else "preempted")
    assert said["restarts"] == 0 and "restart 1" not in err


def test_after_a_hung_collective_all_start_again(folder: Folder) -> None:
    task = folder.task("flaky", how="hang", starts="${run}/starts")
    _, err = folder(task, TWO, "launcher.max_restarts=1", "run=mine")
    assert "restart 1 of 1, from the start: rank 1 did not reach the all_reduce that rank 0" in err
    mine = folder.path / "mine"
    assert starts(mine) == ["22", "22"] and result(mine)["restarts"] == 1
    assert "unreachable_disk" in (mine / "logs/rank-1.log").read_text()
    assert "all_reduce" in (mine / "logs/rank-0.log").read_text()


def test_without_the_kernels_help_a_pipe_tells_that_the_parent_has_ended(tmp_path: Path) -> None:
    child = (
        "import time, pathlib, os; from ditty_di.launch import parent_death as p;"
        "p.die_with_parent_thread = lambda: False; p.follow_parent();"
        "pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    )
    parent = (
        "import os, sys; from ditty_di.launch.processes import Children;"
        f"command = {{'args': [sys.executable, '-c', {child!r}], 'env': dict(os.environ)}};"
        "Children(print, 1.0).run([command])"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=env)
    wait_for(tmp_path / "pid", process=process)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert gone(int((tmp_path / "pid").read_text()), seconds=5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_random_kills_change_nothing_in_the_end(tmp_path: Path) -> None:
    assert chaos.run(tmp_path, kills=3, steps=40) == []
