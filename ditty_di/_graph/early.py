"""Checks of a target's own that run before anything is built: its `validate` and `rehearse`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_NAMED = re.compile(r"[A-Za-z_][\w.]*(?:=|:\s)")
_NAME = re.compile(r"([A-Za-z_][\w.]*)=|^([A-Za-z_][\w.]*):\s|(?<=: )([A-Za-z_]\w*) must")

_PLAIN = re.compile(r"(int|float|bool|str|None|[ |])+")

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


def wanted(check: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the known arguments that a `validate` wants to see. A parameter that is annotated as
    a plain value is given no view."""

    def fits(parameter: inspect.Parameter) -> bool:
        plain = _PLAIN.fullmatch(
            str(getattr(parameter.annotation, "__name__", parameter.annotation))
        )
        return not (plain and isinstance(known[parameter.name], View))

    parameters = inspect.signature(check).parameters
    return {n: known[n] for n, p in parameters.items() if n in known and fits(p)}


def complaints(error: Exception) -> Iterator[tuple[list[str], str]]:
    """(arguments, message) of each thing that a `validate` or `rehearse` complained about.

    A message is about the first argument of the node that it names as `name=` or, at its beginning,
    as `name: `; with dots, about a value in that argument, or the node's own name stands before it.
    When every line of the message begins like that, each is a complaint of its own.
    """
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    lines = [line for line in text.splitlines() if line.strip()]
    if not all(_NAMED.match(line) for line in lines):
        lines = [text]
    for line in lines:
        found = ["".join(groups) for groups in _NAME.findall(line)]
        yield [n for name in found for n in (name, name.partition(".")[2]) if n], line


def plain_default(parameter: inspect.Parameter) -> bool:
    """Whether a parameter's default is a plain value: None, a scalar, a tuple or list of them."""

    def plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    return parameter.default is not parameter.empty and plain(parameter.default)
