"""What to say about an error that is not ours, above all about a key that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ditty_di._graph.targets import did_you_mean
from ditty_di.cli import searchpath
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import without
from ditty_di.graph import ConfigError


def explain(error: Exception, command: Command) -> str:
    """One message, with what was probably meant."""
    from hydra.errors import HydraException

    text = str(error).strip()
    if isinstance(error, HydraException):
        return text.partition("\nConfig search path:")[0] + _hint(text, command)
    if isinstance(error, ConfigError | OSError):
        return text
    return f"{type(error).__name__}: {text}\n(debug=true shows where)"


def _hint(text: str, command: Command) -> str:
    if key := re.search(r"Could not override '([^']+)'", text):
        return did_you_mean(key[1], _keys(command, key[1])).replace("; ", "\n")
    if choice := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        if choice[1].startswith("hydra/"):
            return "\nis that plugin of Hydra installed? for Optuna: pip install 'ditty_di[optuna]'"
        return did_you_mean(choice[2], re.findall(r"^\t(\S+)$", text, re.M)).replace("; ", "\n")
    return ""


def _keys(command: Command, wrong: str) -> list[str]:
    """Every key that may be overridden, and every group."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    folders = [*searchpath.user_dirs(command.config_dirs), searchpath.conf_dir()]
    keys = list(searchpath.groups(folders))
    try:
        with initialize_config_dir(str(searchpath.conf_dir()), version_base="1.3"):
            config = compose(command.config_name, without(command.overrides, wrong))
        keys += _dotted(OmegaConf.to_container(config))
    except Exception:  # something else is wrong too: then there is no hint
        pass
    return keys


def _dotted(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _dotted(inner, f"{prefix}{key}.")
