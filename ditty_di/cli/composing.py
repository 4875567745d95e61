"""Compose a configuration, or a sweep of them, with Hydra, and call a function with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import hydra
from hydra import compose, initialize_config_dir, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditty_di.cli import no_choice, searchpath
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import is_sweep, value_of, without
from ditty_di.config import ConfigError, Problem
from ditty_di.config.targets import TargetError, locate
from ditty_di.replaced import replaced

# Launchers and sweepers, which Hydra takes from its plugins only, and what it logs with.
_OF_HYDRA = ("hydra_plugins.", "hydra._internal.core_plugins.", "logging.FileHandler")


class UserFolders(SearchPathPlugin):
    """Search a user's folders before the shipped configuration."""

    command = Command()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Prepend the user's folders; called by Hydra."""
        for folder in reversed(searchpath.user_dirs(self.command.config_dirs)):
            search_path.prepend("user", f"file://{folder}")
        search_path.append("no choice", no_choice.PATH)


def register(command: Command) -> None:
    """Let Hydra find configuration in the command's folders from here on in this process."""
    UserFolders.command = command
    no_choice.register()
    Plugins.instance().register(UserFolders)


def asks_for_sweep(command: Command) -> bool:
    """Return whether a command is a sweep: by an option, or by `hydra.mode` in a user's file.

    A file makes no sweep of a run that is named (`run=`), as every job of a sweep is.

    Raises:
        ConfigError: a user's file or override gives Hydra an unsafe target to call before any job.
    """
    register(command)
    if not (
        any("hydra" in o for o in command.overrides) or searchpath.user_dirs(command.config_dirs)
    ):
        return command.sweep
    single = [o for o in without(command.overrides, "allow_targets") if not is_sweep(o)]
    config = composed(command.config_name, single, return_hydra_config=True)
    if config is None:
        return command.sweep
    _check_targets_of_hydra(config, command)
    alone = command.run is not None or command.only_prints
    return command.sweep or (config.hydra.mode == RunMode.MULTIRUN and not alone)


def run(command: Command, job: Callable[[DictConfig], Any]) -> Any:
    """Compose a command's configuration and call `job` with it, once for each job of a sweep.

    Returns:
        What `job` returned; None when Hydra was asked for something else, such as `--cfg`.

    Raises:
        Exception: whatever went wrong, in Hydra or in `job`.
    """
    register(command)
    folder = str(searchpath.conf_dir())
    if command.only_prints:
        return _print(command, folder, job)
    outcome: dict[str, Any] = {}

    def called_by_hydra(config: DictConfig) -> Any:
        try:
            outcome["returned"] = job(config)
        except Exception as error:  # Hydra would print it
            outcome["raised"] = error
        return outcome.get("returned")

    # As hydra.main does, which would compose the configuration once more to learn the mode.
    version.setbase("1.3")
    app = Hydra.create_main_hydra2("ditty_di", create_config_search_path(folder))
    start, mode = (app.multirun, "MULTIRUN") if command.sweep else (app.run, "RUN")
    try:
        start(
            config_name=command.config_name,
            task_function=called_by_hydra,
            overrides=[*command.overrides, f"hydra.mode={mode}"],
        )
    finally:
        GlobalHydra.instance().clear()
    if "raised" in outcome:
        raise outcome["raised"]
    return outcome.get("returned")


def _print(command: Command, folder: str, job: Callable[[DictConfig], Any]) -> None:
    """Let Hydra's own command line do what an option such as `--cfg job` asks for."""
    arguments = [sys.argv[0], *command.hydra_arguments]
    # Otherwise Hydra prints errors and exits by itself.
    with replaced(vars(sys), "argv", arguments), replaced(os.environ, "HYDRA_FULL_ERROR", "1"):
        hydra.main(folder, command.config_name, "1.3")(job)()


def composed(config_name: str, overrides: list[str], **options: Any) -> DictConfig | None:
    """Compose a configuration outside of a job; return None when it does not compose."""
    try:
        with initialize_config_dir(str(searchpath.conf_dir()), version_base="1.3"):
            return compose(config_name, overrides, **options)
    except Exception:  # reported when the command itself is composed
        return None


def _check_targets_of_hydra(config: DictConfig, command: Command) -> None:
    """Refuse unsafe targets that Hydra would call before any job; raise ConfigError.

    Those are nodes below `hydra`, such as callbacks, and the factories of its logging.
    """
    given = value_of(command.overrides, "allow_targets") or ""
    allowed = [name.strip(" '\"") for name in given.strip("[]").split(",")]
    problems = []
    for key, written in _called(OmegaConf.to_container(config.hydra), "hydra"):
        target = written
        if "${" in written:
            with suppress(OmegaConfBaseException):
                target = str(OmegaConf.select(config, key.replace(".()", "[()]")))
        if not target.startswith(_OF_HYDRA):
            try:
                locate(target, allowed)
            except TargetError as error:
                if "refused" in str(error):
                    problems.append(Problem(key, str(error)))
    if problems:
        raise ConfigError(problems)


def _called(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, name) of every callable that Hydra, or `logging.config`, is told to call."""
    if isinstance(value, dict):
        called = ("_target_", "()", *(("class",) if "_logging.handlers." in key else ()))
        yield from ((f"{key}.{n}", v) for n in called if isinstance(v := value.get(n), str))
        for name, below in value.items():
            yield from _called(below, f"{key}.{name}")
    elif isinstance(value, list):
        for n, below in enumerate(value):
            yield from _called(below, f"{key}[{n}]")
