"""What a target takes, and what the slot that it is put in will pass."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import difflib
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ditty_di import protocols
from ditty_di._graph import early, suggestions
from ditty_di._graph.targets import SPECIAL, did_you_mean


class Slot(NamedTuple):
    """What completes a partial: the arguments of a protocol's `__call__`."""

    protocol: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        arguments = [*self.positional, *(f"{name}=" for name in self.keywords)]
        return f"{self.protocol} ({', '.join(arguments)})"


class Misfit(NamedTuple):
    """One argument (None: the call as a whole) that a callable cannot take, and why."""

    argument: str | None
    message: str


_UNKNOWN = object()  # an annotation that cannot be evaluated here
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """The parameters of a callable, and what fits them.

    Raises:
        ValueError, TypeError: the callable has no readable signature.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._parameters = list(_signature(fn).parameters.values())
        kinds = {p.kind for p in self._parameters}
        self._takes_any = inspect.Parameter.VAR_KEYWORD in kinds or _takes_more_than_fields(fn)
        self._takes_any_positional = inspect.Parameter.VAR_POSITIONAL in kinds
        self._named = [p.name for p in self._parameters if p.kind in _NAMED]
        self._positional = [p for p in self._parameters if p.kind in _POSITIONAL]

    def misfits(
        self, positional: int, names: Collection[str], *, partial: bool, slot: Slot | None = None
    ) -> list[Misfit]:
        """Everything wrong with a call, at once.

        Args:
            positional: how many positional arguments the configuration gives.
            names: the keyword arguments that it gives.
            partial: whether arguments may come later; `slot` says which, None that nobody knows.
        """
        late = slot or Slot("", (), ())
        found = [m for name in names if (m := self._unknown(name)) is not None]
        total = positional + len(late.positional)
        if total > len(self._positional) and not self._takes_any_positional:
            takes = f"takes {len(self._positional)} positional argument(s)"
            if positional > len(self._positional):
                found.append(Misfit("_args_", f"{takes}, and _args_ has {positional}"))
            else:
                gives = f"; _args_ has {positional}" if positional else ""
                found.append(Misfit(None, f"{takes}, but its slot calls {slot}{gives}"))
        for n, parameter in enumerate(self._positional[:total]):
            if parameter.name in names and parameter.kind in _NAMED:
                by = "_args_" if n < positional else f"its slot, which calls {slot}"
                found.append(Misfit(parameter.name, f"is given twice: here and by {by}"))
        for name in late.keywords:
            if name in names:
                message = f"is given twice: here and by its slot, which calls {slot}"
                found.append(Misfit(name, message))
            elif name not in self._named and not self._takes_any:
                known = [other for other in self._named if other not in names]
                hint = did_you_mean(name, known)
                found.append(
                    Misfit(None, f"has no parameter {name!r}, but its slot calls {slot}{hint}")
                )
        if slot is not None or not partial:
            filled = {p.name for p in self._positional[:total]} | set(names) | set(late.keywords)
            missing = [
                repr(p.name)
                for p in self._parameters
                if p.default is p.empty
                and p.kind in (*_POSITIONAL, *_NAMED)
                and p.name not in filled
            ]
            if missing:
                nobody = f", and its slot calls {slot}" if slot else ""
                found.append(Misfit(None, f"needs {', '.join(missing)}{nobody}"))
        return found

    @property
    def target(self) -> Callable[..., Any]:
        return self._fn

    def positional_name(self, index: int) -> str | None:
        """The name of the parameter that takes the positional argument at `index`."""
        return self._positional[index].name if index < len(self._positional) else None

    def members(self, argument: str | int) -> set[Any]:
        """The types in the annotation of a parameter, containers without what is in them; empty
        when the parameter does not exist."""
        parameter = self._parameter(argument)
        return set(self._members(parameter)) if parameter is not None else set()

    def default(self, name: str) -> Any:
        """The default of a parameter; raises ValueError when it has none."""
        parameter = next((p for p in self._parameters if p.name == name), None)
        if parameter is None or parameter.default is parameter.empty:
            raise ValueError(f"{name}: is not given, and has no default")
        return parameter.default

    def plain_defaults(self) -> dict[str, Any]:
        """Parameter name -> default, for defaults that are plain values."""
        return {p.name: p.default for p in self._parameters if early.plain_default(p)}

    def _unknown(self, name: str) -> Misfit | None:
        if name in self._named:
            return None
        known = [*self._named, *SPECIAL]
        if self._takes_any:  # then only a name that looks misspelled is suspicious
            hint = did_you_mean(name, [k for k in known if _looks_like(k, name)], cutoff=0.85)
            return Misfit(name, f"looks like a misspelling{hint}") if hint else None
        if any(p.name == name for p in self._positional):
            return Misfit(name, "is a positional-only parameter: give it in _args_")
        return Misfit(name, f"is not a parameter of it{suggestions.parameter(name, known)}")

    def _parameter(self, argument: str | int) -> inspect.Parameter | None:
        if isinstance(argument, int):
            rest = [p for p in self._parameters if p.kind is p.VAR_POSITIONAL]
            return next(iter([*self._positional, *rest][argument:] or rest), None)
        return next((p for p in self._parameters if p.name == argument and p.kind in _NAMED), None)

    def slots(self, argument: str | int) -> list[Slot]:
        """The protocols in the annotation of a parameter (name, or index into `_args_`) that say
        how a partial given there will be completed."""
        parameter = self._parameter(argument)
        if parameter is None:
            return []
        return [slot for member in self._members(parameter) if (slot := _slot(member)) is not None]

    def misread(self, argument: str | int, value: Any) -> str:
        """Why a value is certainly not what a parameter annotated int, float, bool or str means."""
        parameter = self._parameter(argument)
        if parameter is None:
            return ""
        members = set(self._members(parameter))
        numbers = members & {int, float, bool}
        if members <= {str, types.NoneType} and str in members:
            return f"is a {type(value).__name__}, and text is wanted" if _holds(value) else ""
        if not numbers or not members <= {*numbers, types.NoneType}:
            return ""
        if isinstance(parameter.default, str):
            return ""
        wanted = " or ".join(sorted(m.__name__ for m in numbers))
        if _holds(value):
            return f"is a {type(value).__name__}, and {wanted} is wanted"
        if isinstance(value, str):
            message = f"is the text {value!r}, and {wanted} is wanted"
            try:
                float(value)
            except ValueError:
                sweep = "; for a sweep over these values add --multirun" if "," in value else ""
                return f"{message}{sweep}"
            return f"{message}: write it without quotes (from a resolver: ${{oc.decode:...}})"
        if isinstance(value, bool) and bool not in members:
            return f"is {str(value).lower()}, and {wanted} is wanted"
        if isinstance(value, float) and float not in members:
            whole = f": write {int(value)}" if value.is_integer() else ""
            return f"is {value!r}, and {wanted} is wanted{whole}"
        if value is None and types.NoneType not in members and parameter.default is not None:
            return f"is null, and {wanted} is wanted"
        return ""

    def _members(self, parameter: inspect.Parameter) -> list[Any]:
        fn = self._fn
        if isinstance(fn, type):
            own = [
                c.__dict__[n] for c in fn.__mro__ for n in ("__init__", "__new__") if n in vars(c)
            ]
            module = vars(sys.modules.get(fn.__module__, builtins))
            scopes = [getattr(inspect.unwrap(f), "__globals__", {}) for f in own[:1]] + [module]
        else:
            call = fn if hasattr(fn, "__code__") or hasattr(fn, "__func__") else type(fn).__call__
            scopes = [getattr(inspect.unwrap(call), "__globals__", {})]
        return list(_members(parameter.annotation, scopes))


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def _looks_like(known: str, name: str) -> bool:
    """Whether two names may be one word misspelled: `layer1` and `layer2`, or `bos_token_id` and
    `eos_token_id`, are as close as that, and two names nevertheless."""
    if re.sub(r"\d", "", known) == re.sub(r"\d", "", name):
        return False
    words = known.split("_"), name.split("_")
    if len(words[0]) != len(words[1]):
        return True
    return all(difflib.SequenceMatcher(None, *w).ratio() >= 0.75 for w in zip(*words, strict=True))


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):  # annotations are evaluated lazily there: ask for their text
        import annotationlib

        return inspect.signature(fn, annotation_format=annotationlib.Format.STRING)
    return inspect.signature(fn)


def _takes_more_than_fields(fn: Any) -> bool:
    """Whether a dataclass hides `**kwargs` behind its fields, as transformers' configurations do:
    `__init__` is replaced and hands what is no field on to `__post_init__(**kwargs)`."""
    if not (isinstance(fn, type) and dataclasses.is_dataclass(fn)):
        return False
    after = getattr(fn, "__post_init__", None)
    return hasattr(fn.__init__, "__wrapped__") and any(
        p.kind is p.VAR_KEYWORD
        for p in (inspect.signature(after).parameters if after else {}).values()
    )


def _slot(protocol: Any) -> Slot | None:
    if not (isinstance(protocol, type) and getattr(protocol, "_is_protocol", False)):
        return None
    calls = [vars(c)["__call__"] for c in protocol.__mro__ if "__call__" in vars(c)]
    if not calls:
        return None
    parameters = list(_signature(calls[0]).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    return Slot(
        protocol.__name__,
        tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY),
        tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
    )


# Annotations are taken apart name by name, never evaluated as text: most live under TYPE_CHECKING,
# where typing.get_type_hints gives up on the whole function because of one name.
def _members(annotation: Any, scopes: list[Mapping[str, Any]]) -> Iterable[Any]:
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        try:
            yield from _members_of(ast.parse(annotation.strip(), mode="eval").body, scopes)
        except SyntaxError:
            yield _UNKNOWN
        return
    try:
        annotation = getattr(annotation, "__value__", annotation)  # type X = ...
    except NameError:
        annotation = inspect.Parameter.empty
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member, scopes)
    elif origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0], scopes)
    elif annotation is None:
        yield types.NoneType
    elif annotation is inspect.Parameter.empty:
        yield _UNKNOWN
    else:
        yield origin or annotation


def _members_of(tree: ast.expr, scopes: list[Mapping[str, Any]]) -> Iterable[Any]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        yield from _members_of(tree.left, scopes)
        yield from _members_of(tree.right, scopes)
    elif isinstance(tree, ast.Constant) and (tree.value is None or isinstance(tree.value, str)):
        yield from _members(tree.value, scopes)
    elif isinstance(tree, ast.Subscript):
        base = _lookup(ast.unparse(tree.value), scopes)
        inside = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
        if base is typing.Optional or base is typing.Union:
            for part in inside:
                yield from _members_of(part, scopes)
        elif base is typing.Annotated:
            yield from _members_of(inside[0], scopes)
        else:
            yield base
    elif isinstance(tree, ast.Name | ast.Attribute):
        found = _lookup(ast.unparse(tree), scopes)
        # a found string would be an alias in quotes, and could name itself
        yield from [_UNKNOWN] if isinstance(found, str) else _members(found, scopes)
    else:
        yield _UNKNOWN


def _lookup(dotted: str, scopes: list[Mapping[str, Any]]) -> Any:
    first, *rest = dotted.split(".")
    for scope in [*scopes, vars(builtins)]:
        if first in scope:
            try:
                return functools.reduce(getattr, rest, scope[first])
            except AttributeError:
                break
    return getattr(protocols, dotted.rpartition(".")[2], _UNKNOWN)
