"""Checks of a target's own that run before anything is built: its `validate` and `rehearse`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_NAMED = re.compile(r"(?P<name>[A-Za-z_][\w.]*?)\s*(?:=|:\s)")

#: A constructor whose `validate` is already something else, such as a method, may use the second.
VALIDATE = ("validate", "validate_arguments")


@dataclass(frozen=True)
class View:
    """A node as `validate` sees it: what it would call, and the arguments known so far.

    `arguments` holds scalars, lists, dicts and further views, by parameter name, and the defaults
    of the signature where they are plain values.
    """

    key: str
    target: Callable[..., Any]
    partial: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


def validator(target: Callable[..., Any]) -> Callable[..., None] | None:
    """The `validate` of a target, None when it has none.

    It is a static method (or an attribute of a function) all of whose parameters are keyword-only
    with a default; any other attribute of that name, such as a method, is not ours to call.
    """
    for name in VALIDATE:
        found = _attribute(target, name)
        if found is None:
            continue
        parameters = inspect.signature(found).parameters.values()
        if all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters):
            return found
    return None


def rehearsal(target: Callable[..., Any]) -> Callable[..., list[str]] | None:
    """The `rehearse(build)` of a target, None when it has none."""
    found = _attribute(target, "rehearse")
    return found if found is not None and list(inspect.signature(found).parameters) else None


def _attribute(target: Any, name: str) -> Callable[..., Any] | None:
    found = inspect.getattr_static(target, name, None)
    if isinstance(target, type):
        found = found.__func__ if isinstance(found, staticmethod) else None
    elif inspect.ismethod(target):  # a classmethod: what its function was given
        found = getattr(target.__func__, "__dict__", {}).get(name)
    else:
        found = getattr(target, "__dict__", {}).get(name)
    return found if callable(found) else None


def takes(check: Callable[..., Any]) -> set[str]:
    """The arguments that a `validate` wants to see."""
    return set(inspect.signature(check).parameters)


def complaints(error: Exception) -> Iterator[tuple[str, str]]:
    """(argument, message) of each thing that a `validate` or `rehearse` complained about.

    A message that begins with `name=` or `name: ` is about that argument (or, with dots, about a
    value in it); when every line does, each line is a complaint. Otherwise the argument is "".
    """
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    lines = [line for line in text.splitlines() if line.strip()]
    if not all(_NAMED.match(line) for line in lines):
        lines = [text]
    for line in lines:
        match = _NAMED.match(line) if isinstance(error, ValueError) else None
        yield (match["name"] if match else ""), line


def plain_default(parameter: inspect.Parameter) -> bool:
    """Whether a parameter's default is a plain value: None, a scalar, a tuple or list of them."""

    def plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    return parameter.default is not parameter.empty and plain(parameter.default)
