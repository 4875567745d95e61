"""One job: from a composed configuration to an exit code. Runs while Hydra is initialized."""

from __future__ import annotations

import errno
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from ditty_di.cli import environment, ranks, searchpath, texts, unread
from ditty_di.cli.command import Command, nearest, patched
from ditty_di.cli.overrides import argument, value_of, without
from ditty_di.config import ConfigError, Difference, Graph, Problem, difference, provenance
from ditty_di.console import quiet, status
from ditty_di.io import write_json, write_text
from ditty_di.launch import jobs
from ditty_di.launch.rundir import GOOD_STATUSES, RunDirectory
from ditty_di.launch.worker import collect_garbage

Launcher = Callable[[str], int]


def execute(config: DictConfig, command: Command, launcher: Launcher | None = None) -> int:
    """Check a configuration, make the run directory, launch the ranks and report the result.

    Args:
        config: the composed configuration.
        command: the command line it was composed from.
        launcher: used instead of the configuration's own; takes the run directory.

    Returns:
        The exit code.

    Raises:
        ConfigError: the configuration cannot be used; raised before anything is made.
    """
    OmegaConf.set_struct(config, False)
    texts.settle(config, command)
    if OmegaConf.select(config, "task._target_") is None:
        raise ConfigError(
            f"the configuration {command.config_name!r} has no task._target_, so there is nothing "
            "to do; is another conf/config.yaml than ditty_di's in this folder?"
        )
    resumes = False
    if command.earlier:
        assert command.run is not None
        stored = OmegaConf.load(command.run.config)
        resumes = config.task._target_ == stored.task._target_
        if resumes:
            _refuse_changes(stored, config)
        else:
            config = _on_top_of(stored, config, command)
    where = provenance(command.config_name, command.overrides)
    allowed = _allowed_targets(config, command, where)
    plain = Graph(config, where, allow_targets=allowed)
    known = [*unread.problems(plain, config, command), *_outside(plain, config, command)]
    graph = Graph(config, where, allow_targets=allowed, also=known)
    works_on_graph = OmegaConf.select(config, "task._partial_")
    if works_on_graph and OmegaConf.select(config, "task.run") is None:
        plain.check("task")  # other tasks than check go on with an unread key
        collect_garbage()
        plain.build("task")(graph)
        return 0

    if OmegaConf.select(config, "run") is None:
        raise ConfigError("this task works on a run: add run=FOLDER" + nearest(Path("run")))
    _refuse_unknown_run(command)
    status("importing what the configuration names (torch and torchtitan take seconds) ...")
    graph.check("task", "launcher")
    if "trainer" in graph.nodes("task") and (problems := ranks.problems(graph)):
        raise ConfigError(problems)
    collect_garbage()
    of_its_own = resumes or not command.earlier
    target = None if launcher else graph.locate(config.launcher._target_)
    submits = jobs.is_job(target)
    leaves_none = config.run is False and not submits
    if hasattr(target, "follow"):  # several machines: one makes the directory
        meeting = launcher = graph.build("launcher")
        if (code := meeting.follow()) is not None:
            return code
    path = _path(config, command, resumes, temporary=leaves_none)
    if hasattr(target, "preview") and config.launcher.get("dry_run"):
        if of_its_own:
            config.run = str(path.absolute())
        return _preview(path, config, Graph(config, where, allow_targets=allowed), command)
    run = _directory(path, command, resumes, temporary=leaves_none)
    try:
        if of_its_own:
            config.run = str(run.path)
        graph = Graph(config, where, allow_targets=allowed)
        staged = resumes and OmegaConf.select(config, "task.run") is not None
        _write(run.stage() if staged else run, config, graph, command)
        launcher = launcher or graph.build("launcher")
        if submits:
            run.release()  # the job takes the directory over
        code = launcher(str(run.path))
        result = run.read_result()
        if result is None and code == 0:
            result = {"status": "finished"}  # it could not be written, and was printed instead
        if result is None:
            error = f"all ranks exited without a result; exit code {code}"
            result = {"status": "failed", "error": error}
            run.write_result(result, tell=False)  # on a full disk a rank has printed its own
        if code:
            run.unstage()
    except BaseException:
        run.unstage()
        raise
    finally:
        run.stop.unlink(missing_ok=True)
        run.release()
    if leaves_none and code == 0:
        shutil.rmtree(run.path)
    elif of_its_own:
        text = "tokenizer" in graph.nodes("task") and result.get("gives_text", True)
        _print_next_steps(run, result, text=text)
    return code


def _allowed_targets(config: DictConfig, command: Command, where: Any) -> list[str]:
    """Return `allow_targets` as typed now; a file may be of unknown origin, so it cannot allow.

    Raises:
        ConfigError: a file sets it, or it is not a list of names.
    """
    allowed = OmegaConf.select(config, "allow_targets")
    if not allowed:
        return []
    if value_of(command.overrides, "allow_targets") is None:
        names = ",".join(map(str, allowed)) if OmegaConf.is_list(allowed) else str(allowed)
        raise ConfigError(
            f"{where('allow_targets')}: allow_targets counts only when it is typed, so that a file "
            f"from elsewhere cannot allow itself anything; type 'allow_targets=[{names}]'"
        )
    if not OmegaConf.is_list(allowed) or not all(isinstance(name, str) for name in allowed):
        raise ConfigError(f"allow_targets={allowed}: write a list such as [torch.load]")
    return list(allowed)


# -- an earlier run ---------------------------------------------------------------------------


def _refuse_changes(stored: Any, config: DictConfig) -> None:
    """Refuse to go on with other numbers than a run began with, except those in `resume.allow`.

    More steps or epochs are no change: the schedule handles them when it is loaded.
    """

    def lengthens(change: Difference) -> bool:
        numbers = [isinstance(v, int | float) for v in (change.old, change.new)]
        return change.key in ("max_steps", "epochs") and all(numbers) and change.new > change.old

    allowed = list(config.resume.allow)
    ignored = [*config.resume.ignore, "allow_targets", *allowed]
    refused = [c for c in difference(stored, config, ignore=ignored) if not lengthens(c)]
    if refused:
        keys = ",".join([*allowed, *(c.key for c in refused)])
        raise ConfigError(
            "the run was started with other values; going on would not continue it:\n"
            + "\n".join(f"  {c}" for c in refused)
            + f"\nto go on with the new values, add: 'resume.allow=[{keys}]'"
            + "\nto start another run, leave out run= or give a new folder"
        )


def _on_top_of(stored: Any, config: DictConfig, command: Command) -> DictConfig:
    """Return the run's own configuration, changed only by what was typed now."""
    assert command.run is not None
    before = compose(command.config_name, command.run.read_command()["overrides"])
    base, old, new = (OmegaConf.to_container(c) for c in (stored, before, config))
    result = OmegaConf.create(patched(base, old, new))
    result.run = str(command.run.path)
    return result


def _refuse_unknown_run(command: Command) -> None:
    """Refuse a new run directory for a task that has none of its own (`run: null`)."""
    if command.run is not None and not command.earlier:
        alone = compose(command.config_name, without(command.overrides, "run"))
        if OmegaConf.select(alone, "run") is None:
            raise ConfigError(f"run={command.run}: no such run{nearest(command.run.path)}")


# -- the directory ----------------------------------------------------------------------------


def _outside(graph: Graph, config: DictConfig, command: Command) -> list[Problem]:
    """Return the problem of a name that would put a new run outside of the folder of runs."""
    if command.run is not None or ".." not in Path(str(OmegaConf.select(config, "run"))).parts:
        return []
    key = "name" if ".." in Path(str(config.get("name"))).parts else "run"
    message = "leads out of the folder of runs: write a name without '..'"
    return [Problem(key, f"{config[key]} {message}; any folder is run=FOLDER", graph.where(key))]


def _path(config: DictConfig, command: Command, resumes: bool, *, temporary: bool) -> Path:
    """Return the directory of this job, which may exist. One that leaves no run has no name yet."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    name = str(config.task._target_).rpartition(".")[2]
    if temporary:
        return Path(tempfile.gettempdir())
    if config.run is False:  # a scheduler's job needs one that all machines see
        return Path("outputs", "jobs", f"{name}-{stamp}")
    if command.earlier and not resumes:
        return Path(config.run) / "tasks" / f"{name}-{stamp}"
    return command.run.path if command.run is not None else Path(str(config.run))


def _preview(path: Path, config: DictConfig, graph: Graph, command: Command) -> int:
    """Print what the launcher would do in a run directory that is not made."""
    with tempfile.TemporaryDirectory() as folder:
        _write(RunDirectory(folder), config, graph, command)
        return graph.build("launcher").preview(RunDirectory(path), Path(folder))


def _directory(path: Path, command: Command, resumes: bool, *, temporary: bool) -> RunDirectory:
    """Return the directory of this job, made, locked and empty of old results.

    Args:
        path: where it is to be; a number is added to that of a new job if it exists.
        command: the command line.
        resumes: whether the job goes on with the command's run.
        temporary: make it in `path` for a task that leaves no run (`run: false`).

    Raises:
        ConfigError: nothing can be written there, or a scheduler's job has it.
    """
    try:
        if temporary:
            path = Path(tempfile.mkdtemp(prefix="ditty_di-", dir=path))
            RunDirectory(path).temporary.touch()
        elif command.run is None or (command.earlier and not resumes):
            path = _unused(path)
        run = RunDirectory(path)
        if (job := jobs.pending(run)) is not None:
            raise ConfigError(job)
        run.prepare()
        run.job.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ConfigError(
            f"cannot write in {path}: {error.strerror}; give a folder that can be written, "
            f"{argument('run', 'FOLDER')} (for a new run with its experiment beside it)"
        ) from error
    return run


def _unused(path: Path) -> Path:
    """Make `path`, or with a number when another job of the same second has it; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(2):
        try:
            path.mkdir()
            break
        except FileExistsError:
            path = path.with_name(f"{path.name.rpartition('+')[0] or path.name}+{number}")
    return path


def _write(run: RunDirectory, config: DictConfig, graph: Graph, command: Command) -> None:
    write_text(run.config, OmegaConf.to_yaml(config))
    graph.save(run.resolved)
    dirs = [str(folder) for folder in searchpath.user_dirs(command.config_dirs)]
    run.write_command(command.lasting, command.config_name, dirs)
    write_json(run.environment, environment.describe(sys.argv[1:]))


# -- the end ----------------------------------------------------------------------------------


def _print_next_steps(run: RunDirectory, result: dict[str, Any], *, text: bool) -> None:
    """Print where the results are, and the commands that can be typed next."""
    command = f"python -m ditty_di {argument('run', str(run))}"
    good = result["status"] in GOOD_STATUSES
    trained = any(run.path.glob("checkpoints/*"))
    known = [f"{k} {result[k]}" for k in ("step", "objective") if result.get(k) is not None]
    if result.get("objective_step") not in (None, result.get("step")):
        known[-1] += f" (of step {result['objective_step']})"
    curves = shlex.quote(f"{run}/tensorboard")
    lines = [
        (good, f"{', '.join([result['status'], *known])}: {run}"),
        (
            result["status"] != "finished" and (trained or good),
            f"  go on                   {command}",
        ),
        (
            good and trained and text,
            f'  generate                {command} task=generate prompt="..."',
        ),
        (good and (run.path / "export").is_dir(), f"  exported                {run}/export"),
        (
            good and (run.path / "tensorboard").is_dir(),
            f"  curves                  tensorboard --logdir {curves}",
        ),
    ]
    for line in [line for applies, line in lines if applies][: 1 if quiet() else None]:
        print(line)
