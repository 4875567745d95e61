"""The checks that a target brings along, run before anything is built: `validate`, `rehearse`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

_BEGINS_WITH_NAME = re.compile(r"[A-Za-z_][\w.]*(?:=|:\s)")
_NAME = re.compile(r"([A-Za-z_][\w.]*)=|^([A-Za-z_][\w.]*):\s|(?<=: )([A-Za-z_]\w*) must")
_SCALAR_ANNOTATION = re.compile(r"(int|float|bool|str|None|[ |])+")

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class View:
    """A node as `validate` sees it: the callable, and the arguments that are known so far.

    `arguments` holds scalars, lists, dicts and further views by parameter name, and the defaults of
    the signature where they are plain values.
    """

    key: str
    target: Callable[..., Any]
    partial: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


def validate(view: View) -> None:
    """Call the `validate` of a view's target with the known arguments, if it has one.

    That is a static method of a class (or an attribute of a function) whose parameters are all
    keyword-only with a default, called `validate_arguments` where `validate` is something else.
    A parameter that is annotated as a scalar is given no view.
    """
    for name in ("validate", "validate_arguments"):
        check = _attribute(view.target, name)
        parameters = inspect.signature(check).parameters if check else {}
        if check and all(
            p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters.values()
        ):
            check(**{n: view.arguments[n] for n, p in parameters.items() if _fits(p, view)})
            return


def validated(cls: _Class) -> _Class:
    """Let the constructor of a class first call the static method `validate` of that class.

    A decorator. The constructor gives `validate` those of its arguments that have the same name.
    """
    made: Any = cls
    construct, signature = made.__init__, inspect.signature(made.__init__)
    names = inspect.signature(made.validate).parameters.keys() & signature.parameters.keys()

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:  # the constructor itself raises it with a better message
            return construct(self, *args, **kwargs)
        given.apply_defaults()
        made.validate(**{name: given.arguments[name] for name in names})
        return construct(self, *args, **kwargs)

    made.__init__ = checked
    return cls


def rehearsal(target: Callable[..., Any]) -> Callable[..., list[str]] | None:
    """Return the `rehearse(build)` of a target; None when it has none."""
    found = _attribute(target, "rehearse")
    return found if found is not None and inspect.signature(found).parameters else None


def complaints(error: Exception) -> Iterator[tuple[list[str], str]]:
    """Yield (argument names, message) for each complaint of a `validate` or `rehearse`.

    A message is about the first argument of the node that it names as `name=` or, at its beginning,
    as `name: `. With dots the name is that of a value in the argument, or begins with the node's
    own name. When every line of the message begins like that, each is a complaint of its own.
    """
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    lines = [line for line in text.splitlines() if line.strip()]
    if not all(_BEGINS_WITH_NAME.match(line) for line in lines):
        lines = [text]
    for line in lines:
        found = ["".join(groups) for groups in _NAME.findall(line)]
        yield [n for name in found for n in (name, name.partition(".")[2]) if n], line


def _attribute(target: Any, name: str) -> Callable[..., Any] | None:
    if isinstance(target, type):
        found = inspect.getattr_static(target, name, None)
        found = found.__func__ if isinstance(found, staticmethod) else None
    else:  # of a classmethod, what its function was given
        found = getattr(getattr(target, "__func__", target), "__dict__", {}).get(name)
    return found if callable(found) else None


def _fits(parameter: inspect.Parameter, view: View) -> bool:
    annotation = parameter.annotation
    scalar = _SCALAR_ANNOTATION.fullmatch(str(getattr(annotation, "__name__", annotation)))
    known = parameter.name in view.arguments
    return known and not (scalar and isinstance(view.arguments[parameter.name], View))
