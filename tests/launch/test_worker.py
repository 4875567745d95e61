"""A rank, in this process: what it writes, and what it says when it fails."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest
import yaml

from ditty_di.console import Console, Tee
from ditty_di.io import write_text
from ditty_di.launch import worker
from ditty_di.launch.failure import describe
from ditty_di.launch.rundir import RunDirectory
from tests.toy import result


def run_of(path: Path, target: str, **arguments: object) -> RunDirectory:
    run = RunDirectory(path / "run")
    run.prepare()
    task = {"_target_": f"tests.toy_tasks.{target}", **arguments}
    run.resolved.write_text(yaml.safe_dump({"debug": False, "task": task}))
    return run


def test_what_the_task_returns_is_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, "finish", value=3.0)
    assert worker.main(run.path) == 0
    assert result(run.path)["objective"] == 3.0
    assert capsys.readouterr().out == "rank 0 says 3.0\n"
    assert (run.logs / "rank-0.log").read_text() == "rank 0 says 3.0\n"


def test_running_out_of_memory_has_its_own_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, "out_of_memory")
    assert worker.main(run.path) == 1
    assert result(run.path)["status"] == "out of memory"
    assert "more than there is" in capsys.readouterr().err


def test_an_old_failure_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    run = run_of(tmp_path, "out_of_memory")
    worker.main(run.path)
    run.release()
    again = RunDirectory(run.path)
    again.prepare()
    assert again.read_result() is None and again.errors() == []


def test_only_the_first_rank_that_fails_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, "finish", value=1.0, bad=1.0)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert worker.main(run.path) == 1
    said = capsys.readouterr().err
    assert said.count("1.0 is a bad value") == 1
    assert result(run.path)["rank"] == 1
    assert [error["rank"] for error in run.errors()] == [1, 0]


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr, logging.getLogger().handlers[:]
    worker.main(run_of(tmp_path, "finish").path)
    assert (sys.stdout, sys.stderr, logging.getLogger().handlers[:]) == before


def test_a_progress_bar_is_one_line_in_the_log(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        tee = Tee(None, file)
        for step in range(100):
            tee.write(f"\rstep {step}")
        tee.write("\nnext\r\n")
        tee.write("\rlast")
        tee.detach()
        tee.write("after the end")  # by a library that kept the stream
    assert (tmp_path / "log").read_text() == "step 99\nnext\nlast\n"


def test_a_console_leaves_loggers_as_they_were(tmp_path: Path) -> None:
    """What tests and notebooks that go on in this process log must not change."""
    ours, root = logging.getLogger("ditty_di"), logging.getLogger()
    before = ours.level, root.level, list(root.handlers)
    with Console(tmp_path / "log", show=False):
        assert ours.level == logging.INFO
    assert (ours.level, root.level, list(root.handlers)) == before


def test_a_closed_console_does_not_end_a_run(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with (tmp_path / "log").open("w") as file:
        tee = Tee(Gone(), file)
        tee.write("step 1\n")
        tee.flush()
        tee.detach()
    assert (tmp_path / "log").read_text() == "step 1\n"


def test_a_failure_names_rank_step_node_and_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    shard = {"_target_": "tests.toy_tasks.Shard", "step": 13}
    run = run_of(tmp_path, "read", shard=shard)
    assert worker.main(run.path) == 1
    told = r"rank 1, step 13: task.shard: OSError: shard 7 is unreadable \(.*toy_tasks.py:\d+\)"
    assert re.search(f"^failed: {told}$", capsys.readouterr().err, re.M)
    assert re.fullmatch(told, result(run.path)["error"])
    assert (result(run.path)["step"], result(run.path)["node"]) == (13, "task.shard")


def test_a_target_that_cannot_be_imported_is_told_with_its_key(tmp_path: Path) -> None:
    run = run_of(tmp_path, "finish", value={"_target_": "no_such_module.Thing"})
    assert worker.main(run.path) == 1
    assert "task.value._target_: " in result(run.path)["error"]
    assert "no module 'no_such_module'" in result(run.path)["error"]


def test_an_exception_of_a_data_loader_worker_is_told_by_its_own_line(tmp_path: Path) -> None:
    text = (
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "/usr/lib/site-packages/torch/utils/data/_utils/worker.py", line 349, in _w'
        '\n    data = 1\n  File "/home/me/shards.py", line 12, in __getitem__\n    raise OSError\n'
        "OSError: shard 7 is unreadable\n"
    )
    told = describe(OSError(text), None, 0, "")["error"]
    assert told == "OSError: shard 7 is unreadable (/home/me/shards.py:12)"
    killed = RuntimeError("DataLoader worker (pid 41) is killed by signal: Killed. ")
    told = describe(killed, None, 0, "SIGKILL: the kernel ran out of memory")["error"]
    assert "worker with pid 41 ended" in told and "the kernel ran out of memory" in told


def test_a_directory_is_refused_while_a_rank_of_a_dead_launcher_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditty_di.launch.rundir._ENDING_SECONDS", 0.3)
    launcher = run_of(tmp_path, "finish")
    rank = RunDirectory(launcher.path)
    rank.join(1)
    launcher.release()
    with pytest.raises(BlockingIOError, match=r'another process is working in ".*/run" .*pid'):
        RunDirectory(launcher.path).prepare()
    rank.release()
    RunDirectory(launcher.path).prepare()


def test_what_a_start_left_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    run = run_of(tmp_path, "finish")
    (run.path / ".config.yaml.123").touch()
    assert run.is_free()
    (run.path / "thesis.txt").touch()
    assert not run.is_free()


def test_what_is_staged_becomes_the_runs_own_only_when_it_is_adopted(tmp_path):
    run = RunDirectory(tmp_path)
    write_text(run.resolved, "old")
    write_text(run.stage().resolved, "new")
    assert run.to_build.read_text() == "new" and run.resolved.read_text() == "old"
    run.unstage()
    assert run.to_build.read_text() == "old"

    staged = run.stage()
    write_text(staged.resolved, "new")
    run.adopt()
    assert run.resolved.read_text() == "new" and not staged.path.exists()

    staged = run.stage()  # died while it was adopted: the next start finishes it
    write_text(staged.resolved, "newer")
    (staged.path / "loaded").touch()
    run.prepare()
    run.release()
    assert run.resolved.read_text() == "newer" and not staged.path.exists()


def test_a_result_that_cannot_be_written_is_on_the_console(tmp_path, capsys):
    run = RunDirectory(tmp_path / "file" / "run")
    (tmp_path / "file").touch()
    run.write_result({"status": "failed", "error": "no space"})
    said = capsys.readouterr().err
    assert "cannot be written" in said and '"error": "no space"' in said
    run.write_result({"status": "failed", "error": "another"}, tell=False)
    assert capsys.readouterr().err == ""
