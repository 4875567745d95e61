"""Hydra as it is used here: composes a configuration, or a sweep of them, and calls a function."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from ditty_di.cli import searchpath
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import is_sweep, value_of, without
from ditty_di.config.errors import ConfigError, Problem
from ditty_di.config.targets import TargetError, locate

# Launchers and sweepers, which Hydra takes from its plugins alone, and what it logs with.
_OF_HYDRA = ("hydra_plugins.", "hydra._internal.core_plugins.", "logging.FileHandler")
_FULL_ERROR = "HYDRA_FULL_ERROR"


class UserFolders(SearchPathPlugin):
    """Puts a user's folders before the shipped configuration, so that theirs win."""

    command = Command()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(searchpath.user_dirs(self.command.config_dirs)):
            search_path.prepend("user", f"file://{folder}")


def register(command: Command) -> None:
    """From here on, what Hydra composes in this process may come from the command's folders."""
    UserFolders.command = command
    Plugins.instance().register(UserFolders)


def run(command: Command, job: Callable[[DictConfig], Any]) -> Any:
    """What `job` returned, when Hydra called it; None when it was asked for something else.

    Raises whatever went wrong, in Hydra or in `job`.
    """
    register(command)
    if _may_change_hydra(command):
        _refuse_targets_of_hydra(command)
    outcome: dict[str, Any] = {}
    wanted = os.environ.get(_FULL_ERROR)

    def called_by_hydra(config: DictConfig) -> Any:
        try:
            with _variable(_FULL_ERROR, wanted):  # as it was, for the processes that a job starts
                outcome["returned"] = job(config)
        except Exception as error:  # Hydra would print it
            outcome["raised"] = error
        return outcome.get("returned")

    before = sys.argv
    sys.argv = [before[0], *command.hydra_arguments]
    try:
        with _variable(_FULL_ERROR, "1"):  # otherwise Hydra prints errors and exits by itself
            hydra.main(str(searchpath.conf_dir()), command.config_name, "1.3")(called_by_hydra)()
    finally:
        sys.argv = before
    if "raised" in outcome:
        raise outcome["raised"]
    return outcome.get("returned")


def _may_change_hydra(command: Command) -> bool:
    """Whether files of the user, or an override, may reach Hydra's own section."""
    typed = any("hydra" in override for override in command.overrides)
    return typed or bool(searchpath.user_dirs(command.config_dirs))


def _refuse_targets_of_hydra(command: Command) -> None:
    """Refuse what Hydra would call before any job: nodes below `hydra`, such as callbacks, and the
    factories of its logging; raises ConfigError. What does not compose, Hydra says itself."""
    given = value_of(command.overrides, "allow_targets") or ""
    allowed = [name.strip(" '\"") for name in given.strip("[]").split(",")]
    kept = without(command.overrides, "allow_targets")
    try:
        with initialize_config_dir(str(searchpath.conf_dir()), version_base="1.3"):
            single = [o for o in kept if not is_sweep(o)]
            config = compose(command.config_name, single, return_hydra_config=True)
        section = OmegaConf.to_container(config.hydra, resolve=False)
        found = [
            (
                key,
                str(OmegaConf.select(config, key.replace(".()", "[()]")) if "${" in name else name),
            )
            for key, name in _called(section, "hydra")
        ]
    except Exception:
        return
    problems = []
    for key, target in found:
        if not target.startswith(_OF_HYDRA):
            try:
                locate(target, allowed)
            except TargetError as error:
                if "refused" in str(error):
                    problems.append(Problem(key, str(error)))
    if problems:
        raise ConfigError(problems)


def _called(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, name) of every callable that Hydra, or `logging.config`, is told to call."""
    if isinstance(value, dict):
        called = ("_target_", "()", *(("class",) if "_logging.handlers." in key else ()))
        yield from ((f"{key}.{n}", v) for n in called if isinstance(v := value.get(n), str))
        for name, below in value.items():
            yield from _called(below, f"{key}.{name}")
    elif isinstance(value, list):
        for n, below in enumerate(value):
            yield from _called(below, f"{key}[{n}]")


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
