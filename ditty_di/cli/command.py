"""Parse a command line into what Hydra composes: options, overrides, and the run they are about."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser

from ditty_di.cli import searchpath
from ditty_di.cli.overrides import (
    argument,
    key_of,
    literal,
    merge,
    normalize,
    quoted,
    unreadable,
    value_of,
    without,
)
from ditty_di.config import ConfigError
from ditty_di.launch.rundir import GOOD_STATUSES, RunDirectory

#: What `python -m ditty_di` does when no experiment and no run is named.
DEFAULT_EXPERIMENT = "pretrain"

# Given for one start of a run, and not again when the run goes on. A stored `allow_targets` does
# not count either: a run folder may be of unknown origin.
_ONCE = ("run", "resume", "load", "allow_targets")

#: Hydra's options for which it runs no job of the configuration that is composed.
_PRINTING = ("cfg", "info", "hydra_help", "shell_completion", "experimental_rerun")


@dataclass
class Command:
    """One command line.

    Attributes:
        options: Hydra's own options, such as `--cfg job`.
        overrides: all that Hydra composes: a stored run's own first, then those typed now.
        config_name: name of the primary configuration file, without `.yaml`.
        config_dirs: folders given with `--config-dir` or `--config-path`.
        only_prints: whether an option, such as `--cfg job`, only asks Hydra to print something.
        sweep: whether several jobs are run, one for each combination of values.
        run: the directory given as `run=`.
        earlier: whether that directory holds a run already.
        typed: the overrides of this command line only.
        unreadable: overrides that Hydra can read only in quotes -> as they were typed.
        as_typed: overrides of this command line -> as they were before quoting.
    """

    options: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    config_name: str = "config"
    config_dirs: list[str] = field(default_factory=list)
    only_prints: bool = False
    sweep: bool = False
    run: RunDirectory | None = None
    earlier: bool = False
    typed: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    as_typed: dict[str, str] = field(default_factory=dict)

    @property
    def hydra_arguments(self) -> list[str]:
        """The command line for Hydra."""
        return [*self.options, "--config-name", self.config_name, *self.overrides]

    @property
    def lasting(self) -> list[str]:
        """The overrides that compose this run again."""
        kept = without(self.overrides, *_ONCE)
        return [o for o in kept if not key_of(o).startswith(("hydra.", "hydra/"))] + [
            o for o in self.overrides if key_of(o) == "hydra.searchpath"
        ]


def parse(arguments: Sequence[str]) -> Command:
    """Parse a command line.

    Raises:
        ConfigError: a `run=` that cannot be used.
        SystemExit: an unknown option (argparse).
    """
    parsed = get_args_parser().parse_intermixed_args(list(arguments))
    options = list(arguments)
    for override in parsed.overrides:
        options.remove(override)
    for flag in ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"):
        options = _drop(options, flag)
    sweep = parsed.multirun or value_of(parsed.overrides, "hydra.mode") == "MULTIRUN"
    given = (parsed.config_dir, parsed.config_path)
    config_dirs = [str(Path(folder).absolute()) for folder in given if folder]
    groups = functools.partial(_groups, config_dirs)
    config_name = parsed.config_name or "config"

    def in_defaults(group: str) -> bool:
        folders = [*searchpath.user_dirs(config_dirs), searchpath.conf_dir()]
        return searchpath.in_defaults(group, config_name, folders)

    overrides = normalize(parsed.overrides, sweep=sweep, groups=groups, in_defaults=in_defaults)
    if _takes_runs(overrides, config_dirs):
        overrides = [o.replace("run", "runs", 1) if key_of(o) == "run" else o for o in overrides]
    as_text = unreadable(overrides)
    readable = [as_text.get(override, override) for override in overrides]
    command = Command(
        options=options,
        overrides=readable,
        typed=list(readable),
        unreadable={text: typed for typed, text in as_text.items()},
        as_typed=dict(zip(overrides, parsed.overrides, strict=True)),
        config_name=config_name,
        config_dirs=config_dirs,
        only_prints=any(vars(parsed)[option] for option in _PRINTING),
        sweep=sweep,
    )
    chosen_config = parsed.config_name is not None
    _take_run(command, chosen_config)
    if not command.earlier:
        _take_experiment(command, chosen_config)
    return command


def _takes_runs(overrides: Sequence[str], config_dirs: Sequence[str]) -> bool:
    """Return whether the task looks at any number of folders: its file sets the key `runs`.

    `run=` is that key then, and such a folder may be damaged, or no run at all.
    """
    folders = searchpath.folders(config_dirs)
    name = value_of(overrides, "task")
    file = next((f for d in folders if (f := d / "task" / f"{name}.yaml").is_file()), None)
    return file is not None and bool(re.search("^runs:", file.read_text(encoding="utf-8"), re.M))


def _drop(options: list[str], flag: str) -> list[str]:
    """Return the options without one and its value, `flag value` or `flag=value`."""
    kept = list(options)
    while flag in kept:
        del kept[(at := kept.index(flag)) : at + 2]
    return [option for option in kept if not option.startswith(f"{flag}=")]


def _groups(config_dirs: Sequence[str]) -> Collection[str]:
    return searchpath.groups(searchpath.folders(config_dirs))


def _take_run(command: Command, chosen_config: bool) -> None:
    """Read `run=`, and put an earlier start's overrides before those typed now.

    A new run is made only when the command also says what to run there: an experiment, a task,
    another choice of a group or `--config-name`. Otherwise `run=` means to go on, and a misspelled
    folder would start the default experiment.
    """
    given = value_of(command.overrides, "run")
    if given is None:
        return
    if command.sweep:
        raise ConfigError(
            f"run={given}: every job of a sweep has a directory of its own; "
            f"to choose where they are, type hydra.sweep.dir={given}"
        )
    run = command.run = RunDirectory(given)
    typed = without(command.overrides, "run")
    if run.is_run():
        stored = run.read_command()
        _refuse_earlier_version(run)
        command.overrides = merge(without(stored["overrides"], *_ONCE), typed)
        command.typed = command.overrides[len(command.overrides) - len(typed) :]
        command.config_dirs += [d for d in stored["config_dirs"] if Path(d).is_dir()]
        if command.config_name == "config":
            command.config_name = stored["config_name"]
        command.earlier = True
    elif not run.is_free():
        jobs = sorted(file.parent for file in run.path.glob("*/overrides.yaml"))
        hint = f"; did you mean run={RunDirectory(jobs[0])}?" if jobs else ""
        raise ConfigError(
            f"run={given}: this is no run's directory (it has no config.yaml and overrides.yaml) "
            f"and it is not empty, so no new run is put there{hint}"
        )
    elif not chosen_config:
        groups = _groups(command.config_dirs)
        if not any(key_of(o).partition("@")[0] in groups for o in command.overrides):
            raise ConfigError(
                f"run={run}: no such run{nearest(run.path)}\n"
                f"to start a new run there, say which: experiment={DEFAULT_EXPERIMENT} "
                f"{argument('run', str(run))}"
            )
    command.overrides = without(command.overrides, "run")
    command.overrides.append(f"run={quoted(literal(str(run.path)))}")


def _refuse_earlier_version(run: RunDirectory) -> None:
    """Raise ConfigError for a run whose configuration has other keys than today's."""
    if re.search("^checkpointer:", run.config.read_text(encoding="utf-8"), re.MULTILINE):
        raise ConfigError(
            f"run={run}: this run was written by an earlier version of ditty_di, whose "
            "configuration had other keys (such as checkpointer); resume it with that version, or "
            "start a new run"
        )


def nearest(path: Path) -> str:
    """Return a hint: the runs whose folders are named most like `path`, else the newest usable one.

    Usable is a run with a checkpoint, or one that has not failed.
    """
    folders = {Path("outputs"), path.parent, path.parent.parent}
    files = {
        f for d in folders for depth in ("*", "*/*") for f in d.glob(f"{depth}/overrides.yaml")
    }
    runs = {str(RunDirectory(file.parent)): file.stat().st_mtime for file in files}
    close = difflib.get_close_matches(str(RunDirectory(path)), runs, 3, 0.7)
    if close:
        return f"; the nearest: {', '.join(argument('run', name) for name in close)}"
    for name in sorted(runs, key=lambda name: runs[name], reverse=True):
        run = RunDirectory(name)
        result = run.read_result() or {"status": "finished"}
        if result["status"] in GOOD_STATUSES or run.newest_step() is not None:
            return f"; the newest one here is {argument('run', name)}"
    return ""


def _take_experiment(command: Command, chosen_config: bool) -> None:
    experiment = value_of(command.overrides, "experiment")
    if experiment in ("none", "null", ""):
        command.overrides = without(command.overrides, "experiment")
    elif experiment is None and not chosen_config:
        folders = searchpath.user_dirs(command.config_dirs)
        if not any((folder / "config.yaml").is_file() for folder in folders):
            command.overrides.insert(0, f"experiment={DEFAULT_EXPERIMENT}")


def patched(base: Any, old: Any, new: Any) -> Any:
    """Return `base` with what changed between `old` and `new`, in plain mappings, key by key.

    A node whose `_target_` changed is replaced as a whole: its arguments are another constructor's.
    """
    if not (isinstance(base, dict) and isinstance(old, dict) and isinstance(new, dict)):
        return base if old == new else new
    if old.get("_target_") != new.get("_target_"):
        return new
    result = dict(base)
    for key in old.keys() | new.keys():
        if key not in new:
            result.pop(key, None)
        elif key in base and key in old:
            result[key] = patched(base[key], old[key], new[key])
        elif key not in old or old[key] != new[key]:
            result[key] = new[key]
    return result
