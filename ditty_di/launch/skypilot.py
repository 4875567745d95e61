"""Launch a run on clouds with SkyPilot."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ditty_di.config.early import validated
from ditty_di.launch import jobs
from ditty_di.launch.rundir import RunDirectory
from ditty_di.messages import refuse, too_low

_CONFIG_DIR = "~/ditty_di_run"  # replaced by every launch


@validated
@dataclass(eq=False)
class SkyPilot(jobs.Job):
    """Write a SkyPilot task and call `sky launch`, or `sky jobs launch` for a managed job.

    The composed configuration goes along as file mounts, and the run is made below `runs` on the
    machines. Several machines need that folder to be shared (a volume or bucket in `file_mounts`),
    and so does a managed job that recovers on another machine.

    Args:
        runs: folder of runs on the machines.
        cluster: name of the cluster; None starts a managed job, which recovers from preemption.
        nodes: number of machines.
        nproc: ranks of each machine.
        accelerators: of each machine, such as `H100:8`.
        resources: further resources, such as `{infra: aws, use_spot: true, cpus: 8+}`.
        workdir: folder that is copied to the machines, and in which the ranks run; None copies
            none.
        file_mounts: path there -> path here, a bucket's URL, or a mapping with `source` and `mode`.
        env: environment variables.
        setup: shell lines that prepare a new machine, such as `pip install ditty_di`.
        name: of the task.
        dry_run: print the task and the command, and launch nothing.

    Raises:
        ValueError: an argument is out of range, or `sky` is not on this machine.
    """

    file, program, scheduler = "sky.yaml", "sky", "SkyPilot"

    runs: str = "/runs"
    cluster: str | None = None
    nodes: int = 1
    nproc: int = 1
    accelerators: str | None = None
    resources: Mapping[str, Any] | None = None
    workdir: str | None = None
    file_mounts: Mapping[str, Any] | None = None
    env: Mapping[str, Any] | None = None
    setup: Sequence[str] = ()
    name: str = "ditty_di"
    dry_run: bool = False

    @staticmethod
    def validate(
        *,
        runs: str = "/runs",
        nodes: int = 1,
        nproc: int = 1,
        resources: Mapping[str, Any] | None = None,
        accelerators: str | None = None,
        workdir: str | None = None,
        dry_run: bool = False,
    ) -> None:
        """Raise ValueError for arguments out of range, and when `sky` is missing."""
        wrong = too_low(1, nodes=nodes, nproc=nproc)
        if not PurePosixPath(runs).is_absolute():
            wrong.append(f"runs={runs}: write an absolute path")
        if accelerators is not None and "accelerators" in (resources or {}):
            wrong.append(f"accelerators={accelerators} are in launcher.resources too")
        if workdir is not None and not Path(workdir).is_dir():
            wrong.append(f"workdir={workdir}: there is no such folder")
        refuse([*wrong, *jobs.missing("sky", dry_run)])

    def content(self, run: RunDirectory, config_dir: Path) -> str:
        """Return the task; see `Job.content`."""
        # Of a start that is only shown, the files will be in the run directory.
        at = config_dir if run.path in config_dir.parents else run.path
        config = {
            f"{_CONFIG_DIR}/{name}": str(at / name)
            for name in jobs.CONFIG_FILES
            if (config_dir / name).exists()
        }
        gpus = {"accelerators": self.accelerators} if self.accelerators else {}
        task = {
            "name": self.name,
            "num_nodes": self.nodes,
            "resources": {**gpus, **(self.resources or {})},
            "workdir": self.workdir,
            "envs": {name: str(value) for name, value in (self.env or {}).items()},
            "file_mounts": {**(self.file_mounts or {}), **config},
            "setup": "\n".join(self.setup),
            "run": jobs.ranks_script(
                str(jobs.path_below(self.runs, run)),
                setup=(),
                config_dir=_CONFIG_DIR,
                nodes=self.nodes,
                nproc=self.nproc,
                node='"$SKYPILOT_NODE_RANK"',
                head='"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
            ),
        }
        kept = {key: value for key, value in task.items() if value not in (None, "", {})}
        return jobs.manifest(kept)

    def command(self, file: Path) -> list[str]:
        """Return the command that launches a task; see `Job.command`."""
        launch = ["launch", f"--cluster={self.cluster}"] if self.cluster else ["jobs", "launch"]
        return ["sky", *launch, "--detach-run", "--yes", str(file)]

    def job_id(self, run: RunDirectory, output: str) -> str:
        """Return the name of the cluster, or of the managed job."""
        return self.cluster or self.name

    def hints(self, run: RunDirectory, job: str) -> dict[str, str]:
        """Return what to type next; see `Job.hints`."""
        word = shlex.quote(job)
        logs = f"sky logs {word}" if self.cluster else f"sky jobs logs --name={word}"
        cancel = f"sky cancel {word} --all" if self.cluster else f"sky jobs cancel --name={word}"
        return {
            "run on the machines": str(jobs.path_below(self.runs, run)),
            "output": logs,
            "cancel": cancel,
        }
