"""Hydra as it is used here: composes a configuration, or a sweep of them, and calls a function."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from ditty_di.cli import searchpath
from ditty_di.cli.command import Command

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
