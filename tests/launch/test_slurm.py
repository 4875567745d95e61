"""On a real cluster of two nodes, which `launch/slurm/test-cluster` starts on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.toy import REPOSITORY, Folder, result, wait_for

SCRIPTS = REPOSITORY / "launch" / "slurm"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SMALL = (
    *("data=debug", "parallelize=ddp", "max_steps=4", "model.config.num_hidden_layers=1"),
    *("validator=none", "export=none", "logger.log_interval=1"),
)
SECONDS = 90

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a cluster's user."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        pytest.skip(f"needs Slurm and munge ({', '.join(missing)}), such as Debian's packages")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPTS / "test-cluster", "start", folder], check=True, timeout=60)
    env = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": PATH, "PYTHONPATH": str(REPOSITORY)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**env, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        yield
        subprocess.run([SCRIPTS / "test-cluster", "stop", folder], timeout=60)


@pytest.fixture
def folder(cluster, tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def slurm(*command: Any, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}\n{slurm('scontrol', 'show', 'job')}"
        time.sleep(0.1)


def ended(*jobs: str) -> None:
    until(lambda: not slurm("squeue", "--noheader", f"--jobs={','.join(jobs)}"), "did not end")


def started_again(job: str) -> None:
    """Wait for the second start of a job, but not the two minutes that Slurm waits with it."""

    def described() -> str:
        return slurm("scontrol", "--oneliner", "show", "job", job)

    until(lambda: "Restarts=1" in described() and "JobState=PENDING" in described(), job)
    time.sleep(4)  # the nodes refuse what starts within a second of the first one's end
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    until(lambda: "JobState=PENDING" not in described(), f"job {job} did not start again")


def job_of(run: Path) -> str:
    return json.loads((run / "job.json").read_text())["id"]


def log_of(run: Path) -> str:
    return "".join(file.read_text() for file in sorted(run.glob("logs/slurm-*.log")))


# -- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(cluster, tmp_path_factory) -> Path:
    """The working folder of a run that train.sbatch has trained on two nodes."""
    folder = tmp_path_factory.mktemp("trained")
    options = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=5")
    job = slurm("sbatch", "--parsable", *options, SCRIPTS / "train.sbatch", *SMALL, cwd=folder)
    ended(job)
    run = folder / "outputs/pretrain" / job
    assert (folder / f"train-{job}.log").exists()
    assert result(run)["status"] == "finished", (folder / f"train-{job}.log").read_text()
    assert {file.name for file in run.glob("logs/*")} == {"rank-0.log", "rank-1.log"}
    run.rename(folder / "run")
    return folder


def test_a_preempted_run_is_requeued_and_resumes_exactly(trained: Path, tmp_path: Path) -> None:
    """With time to save before the job is ended, Slurm does not requeue it: the script does."""
    run = tmp_path / "run"
    slurm("scontrol", "update", "PartitionName=low", "GraceTime=60")
    hold = "{_target_: tests.launch.hold.Hold, step: 2, ready: '${run}/ready'}"
    launcher = ("launcher=slurm", "launcher.nodes=2", "launcher.partition=low")
    out = warm.ditty_di(
        tmp_path, "+experiment=pretrain", *SMALL, *launcher, f"run={run}", f"+callbacks.hold={hold}"
    )
    job = job_of(run)
    assert f"Slurm job {job} has the run run" in out and "scancel" in out
    until(lambda: len([*run.glob("ready-*")]) == 2, "no second step")
    refused = warm.run(["-m", "ditty_di", "run=run", "launcher=local"], cwd=tmp_path)
    assert refused.returncode == 2 and f"Slurm job {job} (RUNNING) has the run" in refused.stderr
    other = slurm("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                  f"--output={tmp_path}/other", "--wrap=true")  # fmt: skip
    started_again(job)
    ended(other, job)
    log = log_of(run)
    assert "the job is requeued" in log and "srun: error" not in log
    assert [re.findall(r"step (\d)/4", part) for part in log.split("requeued")] == [
        ["1", "2", "3"],  # ranks agree on the end of a step
        ["4"],
    ]
    whole, resumed = result(trained / "run"), result(run)
    assert resumed["status"] == "finished" and resumed["step"] == whole["step"] == 4
    assert resumed["objective"] == whole["objective"]


def test_the_other_scripts_run(trained: Path) -> None:
    (trained / "texts").mkdir()
    (trained / "texts" / "a.txt").write_text("one two three four five six seven\n" * 999)
    (trained / "asked.jsonl").write_text('{"id": 1, "prompt": "def f(x):"}\n')
    data = ("data=files", "data.path=texts", "tokenizer.vocab_size=300")
    few = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=0", "--time=5")

    def submit(name: str, *arguments: str) -> str:
        return slurm("sbatch", "--parsable", *few, SCRIPTS / f"{name}.sbatch", *arguments,
                     cwd=trained)  # fmt: skip

    jobs = [
        submit("generate", "run", "asked.jsonl", "answers.jsonl", "max_new_tokens=4"),
        submit("export", "run", "export=auto"),
        submit("download", *data),
        submit("tokenize", *data),
    ]
    ended(*jobs)
    logs = "\n".join(file.read_text() for file in trained.glob("*.log"))
    assert json.loads((trained / "answers.jsonl").read_text())["id"] == 1, logs
    assert [*trained.glob("run/tasks/export-*/export/model.safetensors")] or [
        *trained.glob("run/export/model.safetensors")
    ], logs
    assert [*trained.rglob("manifest.json")], logs


# -- jobs ------------------------------------------------------------------------------------------


def test_before_its_time_limit_a_job_is_requeued_and_when_asked_it_ends(folder: Folder) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    out, _ = folder("launcher=slurm", "launcher.nproc=2", task, "run=mine")
    run = folder.path / "mine"
    assert "submitted: mine" in out and "go on" in out
    until((run / "ready-1").exists, "did not start")
    slurm("scancel", "--batch", "--signal=USR1", job_of(run))  # what Slurm sends before the limit
    until(lambda: "the job is requeued" in log_of(run), "was not requeued")
    (run / "ready-1").unlink()
    started_again(job_of(run))
    until((run / "ready-1").exists, "did not start again")
    (run / "stop").touch()
    ended(job_of(run))
    assert result(run)["status"] == "preempted"
    assert log_of(run).count("the job is requeued") == 1
    _, err = folder("run=mine", "launcher=local", "task=finish")  # the job has left the run
    assert "has the run" not in err


def test_who_waits_gets_the_exit_code_and_the_error_of_the_run(folder: Folder) -> None:
    wait = ("launcher=slurm", "launcher.nodes=2", "launcher.wait=true", "launcher.max_restarts=1")
    folder(*wait, "task.bad=1.0", "run=mine", code=1)
    run = folder.path / "mine"
    assert "is a bad value" in result(run)["error"] and "start 2 of 2" in log_of(run)
    out, _ = folder(*wait, "run=other", "launcher.setup=[export GREETING=hello]")
    assert (
        "finished, step 3" in out
        and "GREETING=hello" in (folder.path / "other/job.sbatch").read_text()
    )


def test_a_task_that_leaves_no_run_has_a_folder_that_its_machines_see(folder: Folder) -> None:
    lines = ["# @package _global_", "run: false", "task: {_target_: tests.toy_tasks.sign}"]
    folder.write("conf/task/sign.yaml", "\n".join(lines))
    folder("launcher=slurm", "launcher.nodes=2", "launcher.wait=true", "task=sign")
    assert {p.name for p in folder.path.glob("signed-*")} == {"signed-by-0", "signed-by-1"}
    assert len([*folder.path.glob("outputs/jobs/sign-*/result.json")]) == 1


def test_a_sweep_is_a_job_array_and_each_failed_job_is_a_row(folder: Folder) -> None:
    folder.task("never_stops", ready="${run}/ready")
    sweep = ("--multirun", "hydra/launcher=slurm", "hydra.launcher.time=5", "hydra.sweep.dir=swept")
    process = folder.start(*sweep, "task=finish,never_stops", "value=1.0,2.0")
    ready = [folder.path / f"swept/{n}/ready-0" for n in (2, 3)]
    wait_for(*ready, process=process, seconds=SECONDS)
    for file in ready:  # as the kernel does for want of memory
        os.kill(int(file.read_text()), signal.SIGKILL)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, out + err
    rows = json.loads((folder.path / "swept/results.json").read_text())
    assert [(row["job"], row["status"]) for row in rows] == [
        *(("0", "finished"), ("1", "finished"), ("2", "failed"), ("3", "failed"))
    ]
    assert "ended without a result" in out.splitlines()[-1]
