"""Started by hand under torchrun."""

from pathlib import Path

import pytest

from tests.toy import Folder, result

TORCHRUN = ("--standalone", "--nproc-per-node", "2", "-m", "ditty_di")


def torchrun(folder: Folder, *arguments: str, code: int = 0) -> tuple[str, str]:
    return folder(*TORCHRUN, *arguments, module="torch.distributed.run", code=code)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_all_ranks_work_in_one_directory(folder: Folder) -> None:
    folder.write("conf/task/hydra_free.yaml", "_target_: tests.toy_tasks.hydra_on_rank")
    out, _ = torchrun(folder, "task=hydra_free")
    run = folder.run()
    assert {p.name for p in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert "hydra False" in (run / "logs/rank-1.log").read_text()
    assert result(run)["status"] == "finished"
    assert out.count("finished: outputs/toy/") == 1


def test_a_configuration_error_ends_all_ranks_with_one_message(folder: Folder) -> None:
    _, err = torchrun(folder, "vlaue=3", code=1)
    assert err.count("did you mean 'value'?") == 1
    assert not (folder.path / "outputs").exists()


def test_a_failing_rank_ends_all_with_one_message(folder: Folder) -> None:
    task = folder.task("collective", fails_on=1)
    _, err = torchrun(folder, task, "run=mine", code=1)
    assert err.count("this rank cannot go on") == 1 and "failed: " in err
    assert result(folder.path / "mine")["rank"] == 1


def test_a_sweep_under_torchrun_is_refused(folder: Folder) -> None:
    _, err = torchrun(folder, "--multirun", "value=1,2", code=1)
    assert err.count("python -m ditty_di --multirun value=1,2 launcher.nproc=2") == 1
    assert not (folder.path / "multirun").exists()


def test_of_a_task_that_leaves_no_run_each_rank_starts_the_command(folder: Folder) -> None:
    """Its temporary directory is on one machine alone, and is removed when rank 0 is done."""
    lines = ["# @package _global_", "run: false", "task: {_target_: tests.toy_tasks.sign}"]
    folder.write("conf/task/sign.yaml", "\n".join(lines))
    torchrun(folder, "task=sign")
    assert {p.name for p in folder.path.glob("signed-*")} == {"signed-by-0", "signed-by-1"}
    assert not (folder.path / "outputs").exists()


def test_a_restart_by_torchrun_goes_on_in_the_same_run(folder: Folder) -> None:
    task = folder.task("flaky", how="raise", starts="${run}/starts")
    command = ("--max-restarts", "1", *TORCHRUN, task)
    folder(*command, module="torch.distributed.run")
    run = folder.run()  # one, although the second start would have made its own
    assert [file.read_text() for file in sorted(run.glob("starts-*"))] == ["22", "22"]
    assert result(run)["status"] == "finished"
