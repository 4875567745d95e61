"""What a person is told when a configuration cannot be used, and places in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Place = tuple[Any, ...]  # the keys and indices from the root of the configuration


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration: `file:line: key: message`."""

    key: str
    message: str
    where: str = ""
    core: str = field(default="", compare=False)
    """The part of the message that is the same for every parameter that is given the value."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(Exception):
    """A configuration that cannot be used; one line for each of `problems`."""

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem("", problems)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class BuildError(ConfigError):
    """A node's constructor raised; `__cause__` is what it raised."""


def dotted(place: Place) -> str:
    """`("a", 0, "b")` as `a.0.b`, the spelling of the command line."""
    return ".".join(map(str, place))


def is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def keys(value: Any) -> Iterable[Any]:
    """The keys of a mapping or the indices of a list; nothing for a scalar."""
    if isinstance(value, dict):
        return list(value)
    return range(len(value)) if isinstance(value, list) else ()
