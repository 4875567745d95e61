"""Sweeps: a job is a process, a failure is a row."""

import contextlib
import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ditty_di.sweeps.parallel import ParallelJobs
from tests import warm
from tests.toy import Folder, wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def rows(folder: Folder) -> list[dict]:
    return json.loads((folder.path / "swept/results.json").read_text())


SWEEP = ("--multirun", "hydra.sweep.dir=swept")


def test_a_failed_job_does_not_end_the_sweep_and_is_marked(folder: Folder) -> None:
    out, err = folder(*SWEEP, "value=3,2,1", "task.bad=2", "experiment=other", code=1)
    found = [(r["job"], r["changed"], r["status"], r["objective"]) for r in rows(folder)]
    assert found == [
        ("2", "value=1", "finished", 1.0),
        ("0", "value=3", "finished", 3.0),
        ("1", "value=2", "failed", None),
    ]
    table = [line for line in out.splitlines() if "value=" in line][-3:]
    assert ["value=1" in table[0], "failed" in table[2]] == [True, True]
    assert "2 is a bad value" in out.splitlines()[-1]
    with (folder.path / "swept/results.csv").open() as file:
        assert [row["job"] for row in csv.DictReader(file)] == ["2", "0", "1"]
    assert "Traceback" not in err
    assert "rank 0 says 3" in (folder.path / "swept/0/logs/rank-0.log").read_text()

    out, _ = folder("run=swept/0")  # a job is a run like any other
    assert "rank 0 says 3" in out
    _, err = folder("run=swept", code=2)
    assert "did you mean run=swept/0?" in err


def test_a_file_that_sets_hydras_mode_is_a_sweep(folder: Folder) -> None:
    file = folder.path / "conf/experiment/several.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN, sweep: {dir: swept}, sweeper: {params: {value: '2,1'}}}\n"
    )
    folder("experiment=several")
    assert [(r["job"], r["changed"]) for r in rows(folder)] == [("1", "value=1"), ("0", "value=2")]
    out, _ = folder("run=swept/0")  # one of its jobs is one run
    assert "rank 0 says 2" in out
    out, _ = folder("experiment=several", "--cfg", "hydra", "--package", "hydra.mode")
    assert out.strip() == "RunMode.MULTIRUN"
    folder("experiment=several", "hydra.mode=RUN", "run=alone")
    assert (folder.path / "alone/result.json").exists()


def test_jobs_that_do_not_even_start_are_rows_too(folder: Folder) -> None:
    folder.task("die")
    out, _ = folder(*SWEEP, "task=finish,die", "note='a, b'", code=1)
    assert [(r["status"], r["changed"]) for r in rows(folder)] == [
        ("finished", "task=finish"),
        ("failed", "task=die"),
    ]
    assert "exit code 3" in out
    folder(*SWEEP, "task=finish,die", "note='a, b'", code=1)  # the same folder goes on
    assert len(rows(folder)) == 2


def test_a_mistake_is_found_before_the_first_job(folder: Folder) -> None:
    _, err = folder(*SWEEP, "task=finish,finnish", code=2)
    assert "did you mean 'finish'?" in err
    assert not (folder.path / "swept/0").exists()
    _, err = folder("--multirun", "run=x", "value=1,2", code=2)
    assert "hydra.sweep.dir=x" in err


def test_ctrl_c_ends_the_job_in_good_order_and_then_the_sweep(folder: Folder) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    process = folder.start(*SWEEP, task, "value=1,2,3")
    wait_for(folder.path / "swept/0/ready-0", process=process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert [row["status"] for row in rows(folder)] == ["preempted"]
    assert not (folder.path / "swept/1/config.yaml").exists()


PARALLEL = ("hydra/launcher=parallel", "hydra.launcher.jobs=2")


def test_jobs_run_at_once_and_each_keeps_its_own_log(folder: Folder) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    process = folder.start(*SWEEP, *PARALLEL, task, "value=1,2,3")
    jobs = [folder.path / "swept" / str(n) for n in range(3)]
    wait_for(*(job / "ready-0" for job in jobs[:2]), process=process)
    assert not (jobs[2] / "ready-0").exists()
    for n in (1, 0, 2):
        wait_for(jobs[n] / "ready-0", process=process)
        (jobs[n] / "stop").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted((row["job"], row["status"]) for row in rows(folder)) == [
        (str(n), "preempted") for n in range(3)
    ]


def test_no_job_outlives_a_killed_sweep(folder: Folder) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    process = folder.start(*SWEEP, *PARALLEL, task, "value=1,2")
    jobs = [folder.path / "swept" / str(n) for n in range(2)]
    wait_for(*(job / "ready-0" for job in jobs), process=process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while left := processes_below(folder.path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def processes_below(folder: Path) -> list[str]:
    """Command lines of processes whose working folder is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve() == folder.resolve():
                found.append((process / "cmdline").read_bytes().decode())
    return found


def test_too_many_gpus_a_job_are_refused(folder: Folder, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    _, err = folder(*SWEEP, *PARALLEL, "hydra.launcher.gpus_per_job=2", "value=1,2", code=2)
    assert "2 jobs at once need 4 GPUs and there are 3" in err
    assert ParallelJobs(jobs=3, gpus_per_job=1).slots == [
        {"CUDA_VISIBLE_DEVICES": str(n)} for n in range(3)
    ]


def test_a_sweep_shows_one_line_a_job(folder: Folder) -> None:
    out, _ = folder(*SWEEP, "value=3,2")
    assert "rank 0 says" not in out and out.count("finished, ") == 2
    assert "rank 0 says 3" in (folder.path / "swept/0/logs/rank-0.log").read_text()


OPTUNA = (*SWEEP, "hydra/sweeper=optuna", "value=interval(0.0,1.0)")


def test_optuna_searches_an_interval_survives_failed_trials_and_goes_on(folder: Folder) -> None:
    pytest.importorskip("optuna", minversion="4")
    (folder.path / "conf/task/finish.yaml").write_text(
        "_target_: tests.toy_tasks.fail_above\nvalue: ${value}\nlimit: 0.5\n"
    )
    search = (*OPTUNA, *PARALLEL, "hydra.sweeper.sampler.seed=1")
    folder(*search, "hydra.sweeper.n_trials=5", code=1)
    found = rows(folder)
    assert sorted(row["job"] for row in found) == [str(n) for n in range(5)]
    good = [row["objective"] for row in found if row["status"] == "finished"]
    assert good == sorted(good) and 0 < len(good) < 5
    best = folder.path / "swept/optimization_results.yaml"
    assert f"best_value: {good[0]}" in best.read_text()

    folder(*search, "hydra.sweeper.n_trials=7", code=1)  # two more
    again = rows(folder)
    assert {row["job"] for row in again} - {row["job"] for row in found} == {"5", "6"}
    assert len({row["changed"] for row in again}) == 7, "a seed must not repeat values"
    _, err = folder(*SWEEP, "hydra/sweeper=optuna", "value=1.0,2.0", code=1)
    assert "Its study began with others" in err
    other = ("--multirun", "hydra.sweep.dir=other", "hydra/sweeper=optuna")
    _, err = folder(*other, "value=1.0", code=2)
    assert "no key has values to search" in err


def test_a_trial_that_was_stopped_goes_on_before_new_ones_begin(folder: Folder) -> None:
    pytest.importorskip("optuna", minversion="4")
    task = folder.task("stopped_once", marker="${run}/marker", value="${value}")
    folder(*OPTUNA, task, "hydra.sweeper.n_trials=1")
    (before,) = rows(folder)
    assert before["status"] == "preempted"
    folder(*OPTUNA, task, "hydra.sweeper.n_trials=4")
    assert sorted(row["job"] for row in rows(folder)) == ["0", "1", "2", "3"]
    first = next(row for row in rows(folder) if row["job"] == "0")
    assert (first["status"], first["overrides"]) == ("finished", before["overrides"])


def test_a_search_ends_early_when_too_many_trials_fail(folder: Folder) -> None:
    pytest.importorskip("optuna", minversion="4")
    task = folder.task("fail_above", value="${value}", limit=-1)
    _, err = folder(*OPTUNA, task, "hydra.sweeper.max_failure_rate=0.5", code=1)
    assert "1 of 1 trials failed" in err and len(rows(folder)) == 1


def test_a_script_without_a_guard_can_run_a_sweep(folder: Folder) -> None:
    (folder.path / "script.py").write_text(
        "import sys\nfrom ditty_di.__main__ import main\nprint('once')\nsys.exit(main())\n"
    )
    out, _ = folder(*SWEEP, "value=3,2", command=(sys.executable, "script.py"))
    assert out.count("once") == 1 and [row["status"] for row in rows(folder)] == ["finished"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_what_jobs_are_forked_from_has_one_thread() -> None:
    """Another one may hold a lock while a job is forked, and the job would wait for it forever."""
    receiver, sender = warm.context.Pipe(duplex=False)
    process = warm.context.Process(target=threads_of_parent, args=(sender,))
    process.start()
    assert receiver.poll(60) and receiver.recv() == ["python"]
    process.join(10)


def threads_of_parent(sender) -> None:
    tasks = Path(f"/proc/{os.getppid()}/task").iterdir()
    sender.send([(task / "comm").read_text().strip()[:6] for task in tasks])
