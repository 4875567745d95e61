"""What a target takes, and what the slot that it is given to will pass."""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from ditty_di.config import suggest
from ditty_di.config.targets import SPECIAL
from ditty_di.messages import did_you_mean


class Slot(NamedTuple):
    """What completes a partial: the arguments of a protocol's `__call__`."""

    protocol: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        arguments = [*self.positional, *(f"{name}=" for name in self.keywords)]
        return f"{self.protocol} ({', '.join(arguments)})"


class Misfit(NamedTuple):
    """An argument (None: the call as a whole) that a callable cannot take, and the reason."""

    argument: str | None
    message: str


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """The parameters of a callable, and what fits them.

    Args:
        target: the callable.

    Raises:
        ValueError: the callable has no readable signature.
        TypeError: the same, for some builtins.
    """

    def __init__(self, target: Callable[..., Any]) -> None:
        self.target = target
        self._parameters = list(_signature(target).parameters.values())
        kinds = {p.kind for p in self._parameters}
        self._takes_any = inspect.Parameter.VAR_KEYWORD in kinds or _takes_more_than_fields(target)
        self._takes_any_positional = inspect.Parameter.VAR_POSITIONAL in kinds
        self._named = [p.name for p in self._parameters if p.kind in _NAMED]
        self._positional = [p for p in self._parameters if p.kind in _POSITIONAL]

    def misfits(
        self, positional: int, names: Collection[str], *, partial: bool, slot: Slot | None = None
    ) -> list[Misfit]:
        """Return everything wrong with a call.

        Args:
            positional: number of positional arguments that the configuration gives.
            names: the keyword arguments that it gives.
            partial: whether arguments may come later.
            slot: what comes later; None if that is not known.
        """
        late = slot or Slot("", (), ())
        found = [misfit for name in names if (misfit := self._unknown(name)) is not None]
        total, taken = positional + len(late.positional), len(self._positional)
        if total > taken and not self._takes_any_positional:
            if positional > taken:
                argument, reason = "_args_", f"and _args_ has {positional}"
            else:
                gives = f"; _args_ has {positional}" if positional else ""
                argument, reason = None, f"but its slot calls {slot}{gives}"
            found.append(Misfit(argument, f"takes {taken} positional argument(s), {reason}"))
        by_slot = f"its slot, which calls {slot}"
        for n, parameter in enumerate(self._positional[:total]):
            if parameter.name in names and parameter.kind in _NAMED:
                by = "_args_" if n < positional else by_slot
                found.append(Misfit(parameter.name, f"is given twice: here and by {by}"))
        for name in late.keywords:
            if name in names:
                found.append(Misfit(name, f"is given twice: here and by {by_slot}"))
            elif name not in self._named and not self._takes_any:
                hint = did_you_mean(name, [other for other in self._named if other not in names])
                message = f"has no parameter {name!r}, but its slot calls {slot}{hint}"
                found.append(Misfit(None, message))
        if slot is not None or not partial:
            filled = {*names, *late.keywords, *(p.name for p in self._positional[:total])}
            required = [
                p
                for p in self._parameters
                if p.kind in _POSITIONAL + _NAMED and p.default is _EMPTY
            ]
            missing = ", ".join(repr(p.name) for p in required if p.name not in filled)
            if missing:
                calls = f", and its slot calls {slot}" if slot else ""
                found.append(Misfit(None, f"needs {missing}{calls}"))
        return found

    def name_of(self, argument: str | int) -> str | int:
        """Return the parameter that takes an argument, given by name or position."""
        if isinstance(argument, int) and argument < len(self._positional):
            return self._positional[argument].name
        return argument

    def types(self, argument: str | int) -> set[Any]:
        """Return the types in the annotation of a parameter, containers without their elements.

        Empty if the parameter does not exist.
        """
        parameter = self._parameter(argument)
        return set(self._types(parameter)) if parameter is not None else set()

    def slots(self, argument: str | int) -> list[Slot]:
        """Return the protocols in a parameter's annotation that complete a partial given there."""
        parameter = self._parameter(argument)
        members = self._types(parameter) if parameter is not None else ()
        return [slot for member in members if (slot := _slot(member)) is not None]

    def default(self, name: str) -> Any:
        """Return the default of a parameter; raise ValueError when it has none."""
        parameter = next((p for p in self._parameters if p.name == name), None)
        if parameter is None or parameter.default is _EMPTY:
            raise ValueError(f"{name}: is not given, and has no default")
        return parameter.default

    def plain_defaults(self) -> dict[Any, Any]:
        """Return the defaults that are None, a scalar, or a tuple or list of them, by name."""
        return {p.name: p.default for p in self._parameters if _is_plain(p.default)}

    def misread(self, argument: str | int, value: Any) -> str:
        """Return why a value cannot be what a parameter annotated int, float, bool or str means.

        Returns:
            An empty string when the value may be right.
        """
        parameter = self._parameter(argument)
        if parameter is None:
            return ""
        members, kind = set(self._types(parameter)), type(value).__name__
        holds = isinstance(value, dict | list)
        numbers = members & {int, float, bool}
        if str in members and members <= {str, types.NoneType}:
            return f"is a {kind}, and text is wanted" if holds else ""
        callables = {m for m in members if m is Callable or _slot(m)}
        if holds and callables and members <= {*callables, types.NoneType}:
            return f"is a {kind} without a _target_, and a callable is wanted"
        if not numbers or not members <= {*numbers, types.NoneType}:
            return ""
        if isinstance(parameter.default, str):
            return ""
        wanted = f"{' or '.join(sorted(m.__name__ for m in numbers))} is wanted"
        if holds:
            return f"is a {kind}, and {wanted}"
        if isinstance(value, str):
            try:
                float(value)
                hint = ": write it without quotes (from a resolver: ${oc.decode:...})"
            except ValueError:
                hint = "; for a sweep over these values add --multirun" if "," in value else ""
            return f"is the text {value!r}, and {wanted}{hint}"
        if isinstance(value, bool) and bool not in members:
            return f"is {str(value).lower()}, and {wanted}"
        if isinstance(value, float) and float not in members:
            whole = f": write {int(value)}" if value.is_integer() else ""
            return f"is {value!r}, and {wanted}{whole}"
        if value is None and types.NoneType not in members and parameter.default is not None:
            return f"is null, and {wanted}"
        return ""

    def _unknown(self, name: str) -> Misfit | None:
        if name in self._named:
            return None
        known = [*self._named, *SPECIAL]
        if self._takes_any:  # then only a name that looks misspelled is suspicious
            hint = did_you_mean(name, [k for k in known if _looks_like(k, name)], cutoff=0.85)
            return Misfit(name, f"looks like a misspelling{hint}") if hint else None
        if any(p.name == name for p in self._positional):
            return Misfit(name, "is a positional-only parameter: give it in _args_")
        return Misfit(name, f"is not a parameter of it{suggest.parameter(name, known)}")

    def _parameter(self, argument: str | int) -> inspect.Parameter | None:
        if isinstance(argument, int):
            rest = [p for p in self._parameters if p.kind is p.VAR_POSITIONAL]
            return next(iter([*self._positional, *rest][argument:] or rest), None)
        return next((p for p in self._parameters if p.name == argument and p.kind in _NAMED), None)

    def _types(self, parameter: inspect.Parameter) -> list[Any]:
        """Return the types in a parameter's annotation, evaluated where the target is defined."""
        holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
        names = _Names(_globals(self.target))
        try:
            return list(_flat(typing.get_type_hints(holder, dict(names), names)["it"]))
        except Exception:  # an annotation may be any expression
            return [_Unknown]


# -------------------------------------------------------------------------------- annotations
class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item: Any) -> Any:
        return cls


class _Unknown(metaclass=_AnyAttribute):
    """A type that cannot be found at run time, such as one imported for a type checker only."""


class _Names(dict[str, Any]):
    """The names in an annotation. One that only a type checker sees may be a slot's protocol."""

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        return getattr(importlib.import_module("ditty_di.protocols"), name, _Unknown)


_EMPTY = inspect.Parameter.empty


def _globals(target: Any) -> dict[str, Any]:
    """Return the global names of the function that defines a target's signature."""
    if isinstance(target, type):
        own = (vars(c)[n] for c in target.__mro__ for n in ("__init__", "__new__") if n in vars(c))
        found = getattr(inspect.unwrap(next(own)), "__globals__", {})
        return {**vars(sys.modules.get(target.__module__, builtins)), **found}
    is_function = hasattr(target, "__code__") or hasattr(target, "__func__")
    call = target if is_function else type(target).__call__
    return getattr(inspect.unwrap(call), "__globals__", {})


def _flat(annotation: Any) -> Iterator[Any]:
    """Yield the members of unions, without the arguments of generic types."""
    annotation = getattr(annotation, "__value__", annotation)  # type X = ...
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _flat(member)
    elif annotation is _EMPTY or isinstance(annotation, str | typing.ForwardRef):
        yield _Unknown
    else:
        yield origin or annotation


def _slot(protocol: Any) -> Slot | None:
    if not (isinstance(protocol, type) and getattr(protocol, "_is_protocol", False)):
        return None
    calls = [vars(c)["__call__"] for c in protocol.__mro__ if "__call__" in vars(c)]
    parameters = list(_signature(calls[0]).parameters.values())[1:] if calls else []
    if not calls or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    return Slot(
        protocol.__name__,
        tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY),
        tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
    )


def _signature(target: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):  # annotations are evaluated lazily there: ask for their text
        import annotationlib

        return inspect.signature(target, annotation_format=annotationlib.Format.STRING)
    return inspect.signature(target)


def _takes_more_than_fields(target: Any) -> bool:
    """Return whether a dataclass takes `**kwargs` besides its fields.

    The configurations of transformers do: `__init__` is replaced, and hands what is no field on to
    `__post_init__(**kwargs)`.
    """
    if not (isinstance(target, type) and dataclasses.is_dataclass(target)):
        return False
    if not hasattr(target.__init__, "__wrapped__"):  # type: ignore[misc]
        return False
    after = getattr(target, "__post_init__", None)
    parameters = inspect.signature(after).parameters.values() if after else ()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _looks_like(known: str, name: str) -> bool:
    """Return whether two names may be one word misspelled.

    `layer1` and `layer2`, or `bos_token_id` and `eos_token_id`, are close and still two names.
    """
    if re.sub(r"\d", "", known) == re.sub(r"\d", "", name):
        return False
    words = known.split("_"), name.split("_")
    if len(words[0]) != len(words[1]):
        return True
    return all(difflib.SequenceMatcher(None, *w).ratio() >= 0.75 for w in zip(*words, strict=True))
