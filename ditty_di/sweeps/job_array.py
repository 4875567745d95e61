"""Run the jobs of a sweep as a Slurm job array.

`hydra-submitit-launcher` 1.2 was tried instead (submitit 1.5, Slurm 22.05). The state of its jobs
comes from `sacct`: on a cluster without accounting a sweep did not notice within six minutes that
Slurm had killed a job.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ditty_di.io import write_text
from ditty_di.launch import jobs as launch_jobs
from ditty_di.launch.signals import StopSignals
from ditty_di.launch.slurm import REQUEUE, header
from ditty_di.messages import refuse, too_low
from ditty_di.sweeps.parallel import JobsLauncher, SweepJob


class JobArray(JobsLauncher):
    """Hydra's launcher `slurm`: each job of a sweep is a task of a job array on one machine.

    The sweep waits for all and prints the table; a job that Slurm ended is a row of it. Each task
    runs the command of its job, whose own launcher starts the ranks (`launcher.nproc`). Preempted,
    or before its time limit, it saves, is requeued and goes on. A stop signal ends the waiting jobs
    and asks the running ones to save.

    Args:
        jobs: number of jobs at a time.
        partition: of the cluster; None: its default, as for the other options.
        account: that is charged.
        qos: quality of service.
        time: limit of one start of a job, such as "4:00:00".
        gpus: GPUs of each job.
        cpus: CPUs of each job.
        mem: memory of each job, such as "64G".
        constraint: features that machines must have.
        options: further options of `sbatch`.
        setup: shell lines that run before the job.
        signal_seconds: time before its limit at which a job is asked to save.

    Raises:
        ValueError: a number is less than one, or Slurm is not on this machine.
    """

    def __init__(
        self,
        jobs: int = 16,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        time: str | None = None,
        gpus: int | None = None,
        cpus: int | None = None,
        mem: str | None = None,
        constraint: str | None = None,
        options: Mapping[str, Any] | None = None,
        setup: Sequence[str] = (),
        signal_seconds: int = 120,
    ) -> None:
        wrong = too_low(1, jobs=jobs, gpus=gpus, cpus=cpus)
        refuse([*wrong, *launch_jobs.missing("sbatch", dry_run=False)])
        self.jobs, self.setup_lines = jobs, setup
        self.sbatch = {
            "job-name": "sweep",
            "partition": partition,
            "account": account,
            "qos": qos,
            "time": time,
            "ntasks": 1,
            "gpus-per-node": gpus,
            "cpus-per-task": cpus,
            "mem": mem,
            "constraint": constraint,
            "open-mode": "append",
            "requeue": True,
            "signal": f"B:USR1@{signal_seconds}",
            **(options or {}),
        }

    def run(
        self,
        jobs: Iterable[tuple[int, Sequence[str]]],
        ended: Callable[[int, float | None], None],
    ) -> None:
        """Submit jobs as one array and wait for its end; see `JobsLauncher.run`.

        Raises:
            KeyboardInterrupt: the sweep was asked to stop.
            RuntimeError: Slurm did not take the array.
        """
        composed = {number: self.composed(number, overrides) for number, overrides in jobs}
        for number, objective in zip(composed, self._run([*composed.values()]), strict=True):
            ended(number, objective)

    def _run(self, jobs: Sequence[SweepJob]) -> list[float | None]:
        folder = jobs[0].sweep_folder.absolute()
        names = (folder / f"array-{n}.sbatch" for n in count())
        file = next(name for name in names if not name.exists())
        write_text(file, self._script(jobs, folder))
        command = ["sbatch", "--parsable", str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError("sbatch did not take the job array; its message is above")
        array = done.stdout.strip().partition(";")[0]
        print(f"Slurm job array {array}: {len(jobs)} jobs, {self.jobs} at a time", flush=True)
        print(f"  output  {folder}/slurm-{array}_*.log\n  cancel  scancel {array}", flush=True)

        def ask(number: Any) -> None:
            subprocess.run(["scancel", "--state=PENDING", array])
            for job in jobs:
                if job.run_directory.path.is_dir():
                    job.run_directory.stop.touch()

        with StopSignals(ask) as signals:
            launch_jobs.wait(["squeue", "--noheader", "--format=%T", f"--jobs={array}"])
        objectives = []
        for n, job in enumerate(jobs):
            log = f"{folder}/slurm-{array}_{n}.log"
            lost = f"Slurm job {array}_{n} ended without a result; see {log}"
            objectives.append(job.record(0, lost))
        if signals.first is not None:
            raise KeyboardInterrupt
        return objectives

    def _script(self, jobs: Sequence[SweepJob], folder: Path) -> str:
        python = [sys.executable, "-m", "ditty_di"]
        cases = [
            f"{n}) run={shlex.quote(str(job.run_directory.path))}\n"
            f"    set -- {shlex.join([*python, *job.arguments])} ;;"
            for n, job in enumerate(jobs)
        ]
        log = str(folder / "slurm-%A_%a.log")
        array = {"array": f"0-{len(jobs) - 1}%{self.jobs}", "output": log}
        return _SCRIPT.format(
            header=header({**self.sbatch, **array}),
            setup="\n".join(self.setup_lines),
            cases="\n".join(cases),
            requeue=REQUEUE,
        )


_SCRIPT = r"""#!/bin/bash
# Written by ditty_di.
{header}
{setup}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
asked=
trap 'asked=limit; touch "$run/stop"' USR1
srun "$@" &
while kill -0 $! 2>/dev/null; do wait $!; done # a signal interrupts `wait`
wait $!
code=$?
{requeue}exit "$code"
"""
