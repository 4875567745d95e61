"""Hand a run to a scheduler: write a job file into the run directory and submit it.

The job starts `python -m ditty_di.launch.jobs RUN_DIR` on one machine, which takes the run
directory over, and then `python -m ditty_di.launch RUN_DIR` once a rank.
"""

from __future__ import annotations

import abc
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf

from ditty_di.config import Graph
from ditty_di.io import read_json, write_json, write_text
from ditty_di.launch.rundir import RunDirectory

#: Files of a run directory from which a start on a machine that does not see it makes a new one.
CONFIG_FILES = ("config.yaml", "resolved.yaml", "sources.json", "overrides.yaml")
#: How long locks of an earlier start may survive it: those of a machine that died, on NFS.
_TAKE_OVER_SECONDS = 120.0
#: Of the rendezvous store, on machines that belong to the job alone.
_PORT = 29500
_POLL_SECONDS = 15.0
_UNKNOWN_JOB = re.compile(r"(?i)invalid job id|not ?found")


class Job(abc.ABC):
    """Base of launchers that write a job file and submit it with a scheduler's own program.

    Attributes:
        file: name of the job file in the run directory.
        program: program that submits it.
        scheduler: name of the scheduler in messages.
        dry_run: print the job file and the command that would submit it, and do nothing else.
    """

    file: ClassVar[str]
    program: ClassVar[str]
    scheduler: ClassVar[str]
    dry_run: bool

    @abc.abstractmethod
    def content(self, run: RunDirectory, config_dir: Path) -> str:
        """Return the job file.

        Args:
            run: the run directory; it need not exist.
            config_dir: folder with the configuration that the ranks build.
        """

    @abc.abstractmethod
    def command(self, file: Path) -> list[str]:
        """Return the command that submits a job file."""

    @abc.abstractmethod
    def job_id(self, run: RunDirectory, output: str) -> str:
        """Return the job's identifier.

        Args:
            run: the run directory.
            output: what `command` printed.
        """

    def state_command(self, job: str) -> list[str]:
        """Return the command that prints something while a job waits or runs, and else nothing.

        An empty one means that the scheduler has none.
        """
        return []

    @abc.abstractmethod
    def hints(self, run: RunDirectory, job: str) -> dict[str, str]:
        """Return what to type next -> commands, or files."""

    def preview(self, run: RunDirectory, config_dir: Path) -> int:
        """Print the job file and the command that would submit it; return the exit code 0.

        Args:
            run: the run directory that a start would make.
            config_dir: folder with the configuration that the ranks would build.
        """
        file = run.path / self.file
        print(f"# would be written to {file}\n{self.content(run, config_dir).rstrip()}")
        print(f"\n# and submitted with\n{shlex.join(self.command(file))}")
        return 0

    def __call__(self, run_dir: str | Path) -> int:
        """Submit the run and return, without waiting for its end.

        Args:
            run_dir: a prepared run directory.

        Returns:
            The exit code of the submission.
        """
        run = RunDirectory(run_dir)
        file = run.path / self.file
        write_text(file, self.content(run, run.to_build.parent))
        # Before the job can begin, which removes it.
        run.write_result({"status": "submitted"})
        done = subprocess.run(
            self.command(file), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.stderr.write(done.stdout)
            message = f"{self.program} did not take the job; its message is above"
            run.write_result({"status": "failed", "error": message})
            print(f"failed: {message}", file=sys.stderr)
            return done.returncode
        job = self.job_id(run, done.stdout)
        write_json(run.job, {"id": job})
        print(f"{self.scheduler} job {job} has the run {run}")
        for what, how in self.hints(run, job).items():
            print(f"  {what:23} {how}")
        sys.stdout.flush()
        return 0

    def state(self, job: str) -> str | None:
        """Return the state of a job that waits or runs, "" once it has ended, None if not known.

        Args:
            job: its identifier.
        """
        return state(self.state_command(job))


def state(command: Sequence[str]) -> str | None:
    """Return what a scheduler's program says about a job, "" once it has ended, None if not known.

    Args:
        command: prints something while the job waits or runs; empty where there is no such program.
    """
    if not command:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:  # the scheduler has forgotten the job, or cannot be reached
        return "" if _UNKNOWN_JOB.search(done.stderr) else None
    return " ".join(done.stdout.split())


def wait(command: Sequence[str]) -> None:
    """Return when a job has ended.

    Args:
        command: as for `state`.
    """
    pause = 1.0
    while state(command) != "":
        time.sleep(pause)
        pause = min(pause * 1.2, _POLL_SECONDS)


def pending(run: RunDirectory) -> str | None:
    """Return a sentence about a job that has a run and waits or runs, None if none is known.

    Args:
        run: a run directory; it need not exist.
    """
    if not run.job.exists():
        return None
    try:  # without the `allow_targets` of a file
        launcher = Graph(OmegaConf.load(run.to_build)).build("launcher")
    except Exception:  # it was submitted elsewhere, or its configuration is broken
        return None
    job = str(read_json(run.job)["id"])
    if not isinstance(launcher, Job) or not (now := launcher.state(job)):
        return None
    return (
        f'{launcher.scheduler} job {job} ({now}) has the run "{run}"; wait for it, or end it '
        f"with: {launcher.hints(run, job)['cancel']}"
    )


def is_job(target: object) -> bool:
    """Return whether a launcher's target is a `Job`."""
    return isinstance(target, type) and issubclass(target, Job)


def missing(program: str, dry_run: bool) -> list[str]:
    """Return that the program which submits is not on this machine, unless it is not needed."""
    if dry_run or shutil.which(program) is not None:
        return []
    return [
        f"dry_run=false, and the program {program} is not on this machine: run the command "
        "where it is; launcher.dry_run=true shows here what would be submitted"
    ]


def ranks_script(
    run_dir: str,
    *,
    setup: Sequence[str],
    config_dir: str | None,
    nodes: int,
    nproc: int,
    node: str,
    head: str,
) -> str:
    """Return a shell script that starts the ranks of one machine under torchrun.

    Args:
        run_dir: the run directory as the machines see it.
        setup: shell lines that run first.
        config_dir: shell word for the folder with the configuration of a run that was composed
            elsewhere; None: it is in the run directory.
        nodes: number of machines.
        nproc: ranks of each machine.
        node: shell word for this machine's number.
        head: shell word for the address of machine 0.
    """
    begin = f"python -m ditty_di.launch.jobs {shlex.quote(run_dir)} {config_dir or ''}".rstrip()
    ranks = [
        f"python -m torch.distributed.run --nnodes={nodes} --nproc-per-node={nproc}",
        f"--node-rank={node} --master-addr={head} --master-port={_PORT}",
        f"-m ditty_di.launch {shlex.quote(run_dir)}",
    ]
    lines = [
        "set -e",
        *setup,
        f"if [ {node} = 0 ]; then {begin}; fi",
        "exec " + " \\\n    ".join(ranks),
    ]
    return "\n".join(lines) + "\n"


def options(given: Mapping[str, Any]) -> list[str]:
    """Return options of a program: `--name=value`, `--name` for true; false and None leave it out.

    Args:
        given: name, without dashes -> value.
    """
    kept = {name: value for name, value in given.items() if value not in (None, False)}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in kept.items()]


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, and equal values twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def path_below(runs: str, run: RunDirectory) -> PurePosixPath:
    """Return where a run is on machines that have it below a folder of runs of their own."""
    return PurePosixPath(runs, run.path.parent.name, run.path.name)


def manifest(*documents: Mapping[str, Any]) -> str:
    """Return documents as YAML that people can read."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def begin(run_dir: str, config_dir: str | None = None) -> None:
    """Take a run directory over for a job's ranks, which start once this has returned.

    Removes what an earlier start has left about its end, as `RunDirectory.prepare` does.

    Args:
        run_dir: the run directory.
        config_dir: folder with the configuration of a run that was composed elsewhere; it is copied
            with the path of its run directory replaced by this one.

    Raises:
        BlockingIOError: another process is working in the directory.
    """
    run = RunDirectory(run_dir)
    deadline = time.monotonic() + _TAKE_OVER_SECONDS
    while True:
        try:
            run.prepare()
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    if config_dir is not None:
        composed = str(OmegaConf.load(Path(config_dir, "resolved.yaml")).run)
        target = run.stage() if run.is_run() else run
        for name in CONFIG_FILES:
            if (file := Path(config_dir, name)).is_file():
                text = file.read_text(encoding="utf-8").replace(composed, str(run.path))
                write_text(target.path / name, text)
    run.release()


if __name__ == "__main__":
    begin(*sys.argv[1:])
