"""Keep text as it was typed: `prompt=2024` is four characters, not a number."""

from __future__ import annotations

import functools
import os
import types
from pathlib import Path, PurePath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ditty_di.cli.command import Command
from ditty_di.cli.overrides import key_of, literal, quoted, sign_of, typed_text
from ditty_di.config import ConfigError, Graph
from ditty_di.config.signatures import Signature
from ditty_di.config.targets import TargetError, locate

_TEXT: set[Any] = {str, bytes, os.PathLike, Path, PurePath}
_NUMBERS: set[Any] = {bool, int, float}


def settle(config: DictConfig, command: Command) -> None:
    """Put what was typed wherever only text is wanted, in `config` and in the command's overrides.

    A key holds text when every parameter that it is given to is annotated as text and not as a
    number, or when it is a part of a longer text (`outputs/${name}`). Otherwise the value stays
    what Hydra has read. `null`, and a list for a parameter that takes one, are never text; a value
    in quotes as a whole is the text within.

    Raises:
        ConfigError: Hydra could not read a value, and it is not meant as text.
    """
    graph: Graph | None = None
    for override in list(command.overrides):
        key, text = key_of(override), typed_text(override)
        if text is None or key in ("run", "experiment") or key.startswith("hydra"):
            continue
        graph = graph or Graph(config)
        try:
            value = graph.written(key)
        except ConfigError:
            continue  # a choice of a group
        unread = command.unreadable.get(override)
        if unread:
            text = unread.partition("=")[2]
        else:
            text = typed_text(command.as_typed.get(override, override)) or text
            if value == text and "${" not in text:
                continue
        if graph.holds(key, functools.partial(_wants_text, value)):
            OmegaConf.update(config, key, literal(text), merge=False)
            again = f"{sign_of(override)}{key}={quoted(literal(text))}"
            for overrides in (command.overrides, command.typed):
                overrides[:] = [again if o == override else o for o in overrides]
        elif unread:
            raise ConfigError(f"cannot read {unread!r}: {_complaint(unread)}")


def _complaint(override: str) -> str:
    try:
        return str(OverridesParser.create().parse_override(override).value())
    except HydraException as error:
        return str(error).partition("\n")[0]


def _wants_text(value: Any, target: str, argument: str | int) -> bool:
    """Return whether a parameter takes text, and neither a number nor a container like `value`."""
    try:
        kinds = Signature(locate(target)).types(argument)
    except (TargetError, ValueError, TypeError):
        return False
    containers = kinds - _TEXT - _NUMBERS - {types.NoneType}
    takes_value = containers and isinstance(value, dict | list)
    return bool(kinds & _TEXT) and not kinds & _NUMBERS and not takes_value
