"""Values that are text arrive as they were typed: `prompt=2024` is four letters, not a number."""

from __future__ import annotations

import functools
import os
import types
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditty_di.cli.command import Command
from ditty_di.cli.overrides import key_of, literal, quoted, typed_text
from ditty_di.config import ConfigError, Graph
from ditty_di.config.signatures import Signature
from ditty_di.config.targets import TargetError, locate

_TEXT: set[Any] = {str, bytes, os.PathLike, Path, PurePath}
_SCALARS: set[Any] = {bool, int, float, types.NoneType}


def settle(config: DictConfig, command: Command) -> None:
    """Put what was typed, letter for letter, wherever only text is wanted, in `config` and in the
    command's overrides.

    A key holds text when every parameter that it is given to is annotated as text and not as a
    number, or when it is a part of a longer text (`outputs/${name}`). Else the value stays what
    Hydra has read. `null`, and a list for a parameter that takes one, are never text; a value in
    quotes as a whole is the text within.

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
        text = typed_text(command.as_typed.get(override, override)) or text
        told = command.unreadable.get(override)
        text = told.partition("=")[2] if told else text
        if not told and value == text and "${" not in text:
            continue
        if not graph.holds(key, functools.partial(_wanted, value)):
            if told:
                raise ConfigError(f"cannot read {told!r}: {_complaint(told)}")
            continue
        OmegaConf.update(config, key, literal(text), merge=False)
        sign = override[: len(override) - len(override.lstrip("+"))]
        again = f"{sign}{key}={quoted(literal(text))}"
        for overrides in (command.overrides, command.typed):
            overrides[:] = [again if o == override else o for o in overrides]


def _complaint(override: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return str(OverridesParser.create().parse_override(override).value())
    except HydraException as error:
        return str(error).partition("\n")[0]


def _wanted(value: Any, target: str, argument: str | int) -> bool:
    """Whether a parameter takes text, and neither a number nor, if `value` is one, a container."""
    try:
        members = Signature(locate(target)).types(argument)
    except (TargetError, ConfigError, ValueError, TypeError):
        return False
    texts = members & _TEXT
    scalars = members & (_SCALARS - {types.NoneType})
    containers = members - _TEXT - _SCALARS
    return bool(texts) and not scalars and not (containers and isinstance(value, dict | list))
