"""Configuration errors, and keys inside a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Path = tuple[Any, ...]  # the keys and list indices from the root of the configuration


@dataclass(frozen=True)
class Problem:
    """One error in a configuration, printed as `file:line: key: message`."""

    key: str
    message: str
    where: str = ""
    core: str = field(default="", compare=False)
    """The part of the message that does not depend on which parameter receives the value."""

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
    """A constructor raised; `__cause__` is the original exception."""


def dotted(path: Path) -> str:
    """Return a path in the spelling of the command line: `("a", 0, "b")` as `a.0.b`."""
    return ".".join(map(str, path))


def prefixes(key: str) -> list[str]:
    """Return a dotted key and the keys above it: `a`, `a.b`, `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def is_node(value: Any) -> bool:
    """Return whether a plain value is a mapping with a `_target_`."""
    return isinstance(value, dict) and "_target_" in value


def keys(value: Any) -> Iterable[Any]:
    """Return the keys of a mapping or the indices of a list; nothing for a scalar."""
    if isinstance(value, dict):
        return list(value)
    return range(len(value)) if isinstance(value, list) else ()
