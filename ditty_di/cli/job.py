"""One job: from a composed configuration to an exit code. Runs while Hydra is initialised."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditty_di.cli import environment, searchpath
from ditty_di.cli.command import Command, patched
from ditty_di.cli.overrides import value_of, without
from ditty_di.graph import ConfigError, Difference, Graph, difference, provenance
from ditty_di.rundir import GOOD_STATUSES, RunDirectory

Launcher = Callable[[str], int]


def execute(config: DictConfig, command: Command, launcher: Launcher | None = None) -> int:
    """Checks, makes the run directory, launches the ranks, says how it went.

    `launcher` takes the place of the configuration's own. Raises ConfigError before anything is
    made when the configuration cannot be used.
    """
    OmegaConf.set_struct(config, False)
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
    config.allow_targets = _allowed_targets(config, command, where)
    graph = Graph(config, where, allow_targets=config.allow_targets)
    if OmegaConf.select(config, "task._partial_"):
        graph.check("task")
        graph.build("task")(graph)
        return 0

    if OmegaConf.select(config, "run") is None:
        raise ConfigError("this task works on a run: add run=FOLDER" + _newest())
    _refuse_unknown_run(command)
    _check(graph, "task", "launcher")
    run = _directory(config, command, resumes)
    of_its_own = resumes or not command.earlier
    try:
        if of_its_own:
            config.run = str(run.path)
        graph = Graph(config, graph.where, allow_targets=config.allow_targets)
        staged = resumes and OmegaConf.select(config, "task.run") is not None
        _write(run.stage() if staged else run, config, graph, command)
        code = (launcher or graph.build("launcher"))(str(run.path))
        result = run.read_result()
        if result is None and code == 0:
            result = {"status": "finished"}  # it could not be written, and was said instead
        if result is None:
            result = {"status": "failed", "error": f"no rank said why; exit code {code}"}
            run.write_result(result)
        if code:
            run.unstage()
    except BaseException:
        run.unstage()
        raise
    finally:
        run.stop.unlink(missing_ok=True)
        run.release()
    if of_its_own:
        _say_what_next(run, result, text="tokenizer" in graph.nodes("task"))
    return code


def _check(graph: Graph, *roots: str) -> None:
    problems = {}
    for root in roots:
        try:
            graph.check(root)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ConfigError(problems)


def _allowed_targets(config: DictConfig, command: Command, where: Any) -> list[str]:
    """Return `allow_targets` as typed now; a file may come from somebody else, so it cannot allow.

    Raises ConfigError when a file sets it, or when it is no list of names.
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
    """A run goes on with the numbers that it began with, unless it is told which may change."""
    changed = difference(stored, config, ignore=list(config.resume.ignore))
    allowed = list(config.resume.allow)
    refused = [c for c in changed if not _covers(allowed, c.key) and not _lengthens(c)]
    if refused:
        keys = ",".join([*allowed, *(c.key for c in refused)])
        raise ConfigError(
            "the run was started with other values; going on would not continue it:\n"
            + "\n".join(f"  {c}" for c in refused)
            + f"\nto go on with the new values, add: 'resume.allow=[{keys}]'"
            + "\nto start another run, leave out run= or give a new folder"
        )


def _lengthens(change: Difference) -> bool:
    """More steps or epochs than before: the schedule says how it goes on when it is loaded."""
    numbers = [isinstance(v, int | float) for v in (change.old, change.new)]
    return change.key in ("steps", "epochs") and all(numbers) and change.new > change.old


def _covers(keys: list[str], key: str) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def _on_top_of(stored: Any, config: DictConfig, command: Command) -> DictConfig:
    """The run's own configuration, changed only by what was typed now."""
    from hydra import compose

    assert command.run is not None
    before = compose(command.config_name, command.run.read_command()["overrides"])
    base, old, new = (OmegaConf.to_container(c) for c in (stored, before, config))
    result = OmegaConf.create(patched(base, old, new))
    result.run = str(command.run.path)
    return result


def _refuse_unknown_run(command: Command) -> None:
    """A task that has no directory of its own (`run: null`) makes none."""
    from hydra import compose

    if command.run is not None and not command.earlier:
        alone = compose(command.config_name, without(command.overrides, "run"))
        if OmegaConf.select(alone, "run") is None:
            raise ConfigError(f"run={command.run}: there is no such run" + _newest())


def _newest() -> str:
    """A hint: the newest run that lies where runs lie when nobody says otherwise."""
    runs = sorted(Path("outputs").glob("*/*/overrides.yaml"), key=lambda f: f.stat().st_mtime)
    return f"; the newest one here is run={runs[-1].parent}" if runs else ""


# -- the directory ----------------------------------------------------------------------------


def _directory(config: DictConfig, command: Command, resumes: bool) -> RunDirectory:
    """The directory of this job, made, locked and empty of old results."""
    if command.run is not None and (resumes or not command.earlier):
        run = command.run
    elif command.earlier:
        name = str(config.task._target_).rpartition(".")[2]
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        run = _unused(Path(config.run) / "tasks" / f"{name}-{stamp}")
    else:
        run = _unused(Path(config.run))
    run.prepare()
    return run


def _unused(path: Path) -> RunDirectory:
    """`path`, or with a number when another job of the same second has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(2):
        try:
            path.mkdir()
            break
        except FileExistsError:
            path = path.with_name(f"{path.name.rpartition('+')[0] or path.name}+{number}")
    return RunDirectory(path)


def _write(run: RunDirectory, config: DictConfig, graph: Graph, command: Command) -> None:
    run.write_text(run.config, OmegaConf.to_yaml(config))
    graph.save(run.resolved)
    dirs = [str(folder) for folder in searchpath.user_dirs(command.config_dirs)]
    run.write_command(command.lasting, command.config_name, dirs)
    run.write_text(run.environment, json.dumps(environment.describe(sys.argv[1:]), indent=2) + "\n")


# -- what is said at the end ------------------------------------------------------------------


def _say_what_next(run: RunDirectory, result: dict[str, Any], *, text: bool) -> None:
    """Where things are, and what can be typed next: only what there is."""
    command = f"python -m ditty_di run={shlex.quote(str(run))}"
    failed = result["status"] not in GOOD_STATUSES
    trained = any(run.path.glob("checkpoints/*"))
    lines = []
    if not failed:
        known = [f"{k} {result[k]}" for k in ("step", "objective") if result.get(k) is not None]
        if result.get("objective_step") not in (None, result.get("step")):
            known[-1] += f" (of step {result['objective_step']})"
        lines.append(f"{', '.join([result['status'], *known])}: {run}")
    if result["status"] != "finished" and (trained or not failed):
        lines.append(f"  go on                   {command}")
    if not failed and trained and text:
        lines.append(f'  generate                {command} task=generate prompt="..."')
    if not failed and (run.path / "export").is_dir():
        lines.append(f"  exported                {run}/export")
    if not failed and (run.path / "tensorboard").is_dir():
        lines.append(f"  curves                  tensorboard --logdir {run}/tensorboard")
    if lines:
        print("\n".join(lines))
