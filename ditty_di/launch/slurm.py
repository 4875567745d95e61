"""Submit a run to Slurm as one batch script."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditty_di.config.early import validated
from ditty_di.io import read_json
from ditty_di.launch import jobs
from ditty_di.launch.failure import exit_code, report
from ditty_di.launch.rundir import GOOD_STATUSES, RunDirectory
from ditty_di.messages import refuse, too_low

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE")


@validated
@dataclass(eq=False)
class Slurm(jobs.Job):
    """Submit a batch script that starts the ranks with `srun`, one task a rank.

    Asked to stop (SIGTERM by Slurm, or `touch RUN/stop`) the ranks save and end with status
    `preempted`. The script then requeues the job if it was preempted or was about to reach its time
    limit, and the next start resumes from the run's own checkpoint.

    Args:
        partition: of the cluster; None: its default, as for the other options.
        account: that is charged.
        qos: quality of service.
        time: limit of one start, such as "24:00:00" or "2-12:00:00".
        nodes: number of machines.
        nproc: ranks of each machine.
        gpus_per_node: GPUs of each machine; every rank sees all, and takes that of its number.
        cpus_per_task: CPUs of each rank, and the threads that it uses.
        mem: memory of each machine, such as "200G".
        constraint: features that machines must have.
        options: further options of `sbatch`, such as `{mail-type: END, exclusive: true}`.
        setup: shell lines that run before the ranks: modules, environments, variables of NCCL.
        container: image for `srun --container-image` (pyxis and enroot).
        container_mounts: `FROM:TO` of further folders; the working folder and the run's are
            mounted.
        prefix: words before `python`, such as `apptainer exec --nv image.sif`.
        python: interpreter; None: this one, in a container `python`.
        requeue: requeue the job after preemption, and before its time limit.
        signal_seconds: time before its limit at which the job is asked to save.
        max_restarts: how often the ranks are started again in the same job after a failure.
        name: of the job.
        wait: return when the job has ended, with its exit code.
        dry_run: print the script and the command, and submit nothing.

    Raises:
        ValueError: an argument is out of range, or Slurm is not on this machine.
    """

    file, program, scheduler = "job.sbatch", "sbatch", "Slurm"

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    nodes: int = 1
    nproc: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    constraint: str | None = None
    options: Mapping[str, Any] | None = None
    setup: Sequence[str] = ()
    container: str | None = None
    container_mounts: Sequence[str] = ()
    prefix: str | None = None
    python: str | None = None
    requeue: bool = True
    signal_seconds: int = 120
    max_restarts: int = 0
    name: str = "ditty_di"
    wait: bool = False
    dry_run: bool = False

    @staticmethod
    def validate(
        *,
        time: str | None = None,
        nodes: int = 1,
        nproc: int = 1,
        gpus_per_node: int | None = None,
        cpus_per_task: int | None = None,
        container: str | None = None,
        prefix: str | None = None,
        signal_seconds: int = 120,
        max_restarts: int = 0,
        dry_run: bool = False,
    ) -> None:
        """Raise ValueError for arguments out of range, and when `sbatch` is missing."""
        counts = {"nodes": nodes, "nproc": nproc, "gpus_per_node": gpus_per_node}
        wrong = too_low(1, **counts, cpus_per_task=cpus_per_task)
        if time is not None and not _TIME.fullmatch(time):
            wrong.append(f"time={time!r}: write minutes, H:MM:SS or D-HH:MM:SS")
        if gpus_per_node is not None and nproc > gpus_per_node > 0:
            wrong.append(f"nproc={nproc} ranks of a machine need more than {gpus_per_node} GPUs")
        if container and prefix:
            wrong.append(f"prefix={prefix!r}: give a container by `container` or by `prefix`")
        wrong += too_low(0, signal_seconds=signal_seconds, max_restarts=max_restarts)
        refuse([*wrong, *jobs.missing("sbatch", dry_run)])

    def __post_init__(self) -> None:
        interpreter = self.python or ("python" if self.container else sys.executable)
        self.words = [*shlex.split(self.prefix or ""), interpreter]

    def content(self, run: RunDirectory, config_dir: Path) -> str:
        """Return the batch script; see `Job.content`."""
        log = str(run.logs / "slurm-%j.log").replace("%", "%%").replace("%%j", "%j")
        limit = f"B:USR1@{self.signal_seconds}" if self.requeue and self.signal_seconds else None
        batch = {
            "job-name": self.name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks-per-node": self.nproc,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "constraint": self.constraint,
            "open-mode": "append",
            "requeue" if self.requeue else "no-requeue": True,
            "signal": limit,
            **(self.options or {}),
            "output": log,
        }
        mounts = [str(Path.cwd()), str(run.path), *self.container_mounts]
        step = {
            "cpus-per-task": self.cpus_per_task,
            "container-image": self.container,
            "container-workdir": self.container and str(Path.cwd()),
            "container-mounts": self.container and ",".join(mounts),
        }
        return _SCRIPT.format(
            header=header(batch),
            run=shlex.quote(str(run.path)),
            setup="\n".join(self.setup) or ": # launcher.setup",
            step=" ".join(map(shlex.quote, jobs.options(step))),
            python=shlex.join(self.words),
            attempts=self.max_restarts + 1,
            requeue=REQUEUE if self.requeue else "",
        )

    def command(self, file: Path) -> list[str]:
        """Return the command that submits a script; see `Job.command`."""
        return ["sbatch", "--parsable", str(file)]

    def job_id(self, run: RunDirectory, output: str) -> str:
        """Return the job's number: `sbatch --parsable` prints NUMBER[;CLUSTER]."""
        return output.strip().partition(";")[0]

    def state_command(self, job: str) -> list[str]:
        """Return the command that prints the state of a job; see `Job.state_command`."""
        return ["squeue", "--noheader", "--jobs", job, "--format=%T"]

    def hints(self, run: RunDirectory, job: str) -> dict[str, str]:
        """Return what to type next; see `Job.hints`."""
        return {
            "output": f"tail -F {shlex.quote(str(run.logs / f'slurm-{job}.log'))}",
            "save and end": f"touch {shlex.quote(str(run.stop))}",
            "cancel": f"scancel {job}",
        }

    def __call__(self, run_dir: str | Path) -> int:
        """Submit the run; with `wait` return the exit code of its end. See `Job`."""
        code = super().__call__(run_dir)
        if code or not self.wait:
            return code
        run = RunDirectory(run_dir)
        job = str(read_json(run.job)["id"])
        jobs.wait(self.state_command(job))
        result = run.read_result() or {"status": "submitted"}
        if result["status"] == "submitted":  # no rank has begun
            log = run.logs / f"slurm-{job}.log"
            error = f"Slurm job {job} ended and its ranks left no result; see {log}"
            return report(run, {"status": "failed", "error": error})
        return 0 if result["status"] in GOOD_STATUSES else exit_code(result)


def header(options: Mapping[str, Any]) -> str:
    """Return options of `sbatch` as lines of a script, in double quotes where they need any.

    Args:
        options: name, without dashes -> value.
    """
    plain = re.compile(r"[\w@%+=:,./-]+")
    shown = (o if plain.fullmatch(o) else f'"{o}"' for o in jobs.options(options))
    return "\n".join(f"#SBATCH {option}" for option in shown)


#: `{step}` are options of each `srun`, `{python}` is the interpreter, with a container before it.
_SCRIPT = r"""#!/bin/bash
# Written by ditty_di. To submit it again: sbatch THIS_FILE
{header}
run={run}
step=({step})
python=({python})

# The first machine, by the address that Slurm knows it by.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$head" | sed 's/.* NodeAddr=\([^ ]*\) .*/\1/')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
{setup}

# Slurm tells this shell of the time limit (USR1), and the ranks of everything else (TERM).
asked=
trap 'asked=limit; touch "$run/stop"' USR1
trap 'asked=end; touch "$run/stop"' TERM

rank='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE GROUP_RANK=$SLURM_NODEID
exec "$@"'
for ((attempt = 1; attempt <= {attempts}; attempt++)); do
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${{step[@]}}" \
        "${{python[@]}}" -m ditty_di.launch.jobs "$run" || exit
    srun --kill-on-bad-exit=1 "${{step[@]}}" \
        bash -c "$rank" rank "${{python[@]}}" -m ditty_di.launch "$run" &
    while kill -0 $! 2>/dev/null; do wait $!; done # a signal interrupts `wait`
    wait $!
    code=$?
    if [ "$code" = 0 ] || [ -n "$asked" ]; then break; fi
    echo "srun ended with exit code $code, start $attempt of {attempts} in this job"
done
if [ ! -e "$run/result.json" ]; then
    error="the ranks of Slurm job $SLURM_JOB_ID ended with exit code $code"
    printf '{{"status": "failed", "error": "%s"}}\n' "$error" >"$run/result.json"
fi
{requeue}exit "$code"
"""
#: Behind the ranks: what a preempted or expired job does.
REQUEUE = r"""saved() { grep -q '"status": "preempted"' "$run/result.json"; }
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -Eq 'PreemptTime=[0-9]'; }
if saved && { [ "$asked" = limit ] || preempted; }; then
    echo "saved; the job is requeued and goes on from there"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until Slurm ends this start
fi
"""
