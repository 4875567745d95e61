"""The stages of a pipeline, made from components that are built or from nodes that are not.

A node is a mapping with `_target_`, as in a configuration. The contract of the object that a node
(or a `functools.partial`) will build is the first of

* the argument `contract` in the node, or its default in the signature;
* `contract_for(**arguments)`, a class method that returns the text, or the class attribute
  `contract`; of both, the one that is nearer to the class among its bases;
* the attribute `contract` of a function.

With none of them, or with `contract = None` nearest to the class, the stage is unchecked until it
is built: the source of a constructor that passes a contract to its base is not read.

A class whose objects consist of parts (a composite loss) has a class method
`parts_for(**arguments)`, and its objects an attribute `parts`; both are lists of (name, part). Its
attribute `parts_argument` names the argument that holds them.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ditty_di.config.targets import SPECIAL, TargetError, locate
from ditty_di.contracts.grammar import Contract, as_contract

LOADER, PRE, MODEL, POST, LOSS = "loader", "preprocessor", "model", "postprocessor", "loss"
#: Refusal of processors beside context parallelism.
SPLIT_SEQUENCES = """\
with runtime.cp > 1 each rank has a part of every sequence, and what processors make of a whole \
batch cannot be split; use cp=1"""

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Args:
        kind: loader, preprocessor, model, postprocessor or loss.
        name: shown in messages.
        contract: None leaves it unchecked, unless it consists of `parts` that have one.
        parts: of a composite loss; each takes what the whole takes.
        key: of the node in a configuration.
        error: why its contract cannot be read.
    """

    kind: str
    name: str
    contract: Contract | None = None
    parts: tuple[Stage, ...] = ()
    key: str = ""
    error: str = ""

    def __str__(self) -> str:
        return self.kind if self.name.lower() in ("", self.kind) else f"{self.kind} {self.name}"


def pipeline(
    *,
    loader: Any = None,
    preprocessors: Iterable[Any] = (),
    model: Any = None,
    postprocessors: Iterable[Any] = (),
    loss: Any = None,
    model_contract: str | Contract | None = None,
    loader_contract: str | Contract | None = None,
    key: str = "",
) -> list[Stage]:
    """Return the stages of a pipeline in order.

    Args:
        loader: an object, a node, or None for an unknown one, as are the other components. Without
            a contract it has that of its `collate_fn`, else that of its `dataset`.
        preprocessors: components in order.
        model: a component.
        postprocessors: components in order.
        loss: a component.
        model_contract: replaces the model's own contract.
        loader_contract: replaces the loader's own contract.
        key: of the node in the configuration that has these components, such as `trainer`.
    """
    dotted = f"{key}." if key else ""
    first = _stage(LOADER, loader, f"{dotted}dataloader", loader_contract)
    for source in ("collate_fn", "dataset"):
        if first.contract is None and not first.error:
            inner = _stage(LOADER, argument(loader, source), first.key)
            first = replace(first, contract=inner.contract, error=inner.error)
    model_key = f"{dotted}model_contract" if model_contract else f"{dotted}model"
    return [
        first,
        *(_stage(PRE, p, f"{dotted}preprocessors.{n}") for n, p in enumerate(preprocessors)),
        _stage(MODEL, model, model_key, model_contract),
        *(_stage(POST, p, f"{dotted}postprocessors.{n}") for n, p in enumerate(postprocessors)),
        _stage(LOSS, loss, f"{dotted}loss_fn"),
    ]


def _stage(kind: str, value: Any, key: str, contract: Any = None, name: str = "") -> Stage:
    """Return one stage; a contract that cannot be read becomes its `error`."""
    found: Contract | None = None
    parts: tuple[Stage, ...] = ()
    error = ""
    try:
        source = _source(value)
        name = name or _name(source)
        if kind == LOSS:
            inside, within = _parts(source)
            inner = f"{key}.{within}" if within else key
            parts = tuple(_stage(kind, part, inner, name=called) for called, part in inside)
        found = _contract(source) if contract is None else as_contract(contract)
    except (ValueError, TypeError, TargetError) as failure:
        error = str(failure)
    return Stage(kind, name, found, parts, key, error)


class _Call(NamedTuple):
    """What a node or a partial will call."""

    target: Any
    arguments: dict[str, Any]


def _source(value: Any) -> Any:
    """Return the `_Call` of a node or a partial, and an object as it is."""
    if is_node(value):
        path = str(value["_target_"])
        kwargs = {name: inner for name, inner in value.items() if name not in SPECIAL}
        target = locate(path, allowed=(path,))  # the graph has checked it
        value = functools.partial(target, *value.get("_args_", ()), **kwargs)
    if not isinstance(value, functools.partial):
        return value
    owner = getattr(value.func, "__self__", value.func)  # `Model.from_pretrained` builds a Model
    target = owner if inspect.isclass(owner) else value.func
    return _Call(target, given_arguments(target, value.args, value.keywords, defaults=True))


def _get(source: Any, name: str) -> Any:
    if isinstance(source, _Call):
        return source.arguments.get(name)
    return getattr(source, name, None)


def _name(source: Any) -> str:
    """Return what messages call a component."""
    given = _get(source, "name")
    if source is None or isinstance(given, str):
        return given or ""
    if not isinstance(source, _Call):
        return type(source).__name__
    target = source.target
    name: str = getattr(target, "__name__", type(target).__name__)
    named = any(hasattr(target, method) for method in ("process", "contract_for", "parts_for"))
    return snake_case(name) if named else name


def _parts(source: Any) -> tuple[Iterable[tuple[str, Any]], str | None]:
    """Return the parts of a loss by name, and the argument that has them."""
    if not isinstance(source, _Call):
        return getattr(source, "parts", None) or (), getattr(source, "parts_argument", None)
    parts_for = getattr(source.target, "parts_for", None)
    parts = parts_for(**source.arguments) if parts_for else ()
    return parts, getattr(source.target, "parts_argument", None)


def _contract(source: Any) -> Contract | None:
    own = _get(source, "contract")
    if not isinstance(source, _Call):  # any object may have an attribute of this name
        return as_contract(own) if isinstance(own, str | Contract) else None
    if own is None and inspect.isclass(source.target):
        return contract_of_class(source.target, source.arguments)
    if own is None:  # a function may have the contract of what it returns
        own = getattr(source.target, "__dict__", {}).get("contract")
    return as_contract(own)


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Return the names of the parameters that can be given by name."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind in _NAMED}


def argument(value: Any, name: str) -> Any:
    """Return what a node, a partial or an object has under a name; None without it.

    Args:
        value: the component.
        name: of the argument or attribute.
    """
    return _get(_source(value), name)


def contract_of(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> Contract | None:
    """Return the contract that `target(**kwargs)` will have; None if it is not known before.

    Args:
        target: a class, or any callable.
        kwargs: its arguments; `_args_` are positional.

    Raises:
        ContractError: it cannot be parsed.
    """
    given = {name: value for name, value in kwargs.items() if name != "_args_"}
    return _contract(_source(functools.partial(target, *kwargs.get("_args_", ()), **given)))


def contract_of_class(cls: type, arguments: Mapping[str, Any]) -> Contract | None:
    """Return the contract of `cls(**arguments)` by `contract_for` or `contract` of the class.

    It is unknown (None) where `contract_for` has a parameter that is not in `arguments`, and that
    the constructor of a subclass does not take but passes on with a value of its own.

    Args:
        cls: the class.
        arguments: of its constructor, by name.

    Raises:
        ContractError: the contract cannot be parsed.
    """
    for base in inspect.getmro(cls):
        if isinstance(vars(base).get("contract"), str | Contract):
            return as_contract(vars(base)["contract"])
        if "contract_for" in vars(base):
            function: Any = cls.contract_for  # type: ignore[attr-defined]
            known = _parameters(cls.__init__) | arguments.keys()  # type: ignore[misc]
            return as_contract(function(**arguments)) if _parameters(function) <= known else None
        if "contract" in vars(base):
            return None
    return None


def is_node(value: Any) -> bool:
    """Return whether a value is a node of a configuration."""
    return isinstance(value, Mapping) and "_target_" in value


def snake_case(name: str) -> str:
    """Return `MSELoss` as `mse_loss`."""
    return _WORD.sub("_", name).lower()


def given_arguments(
    target: Callable[..., Any],
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    *,
    defaults: bool = False,
) -> dict[str, Any]:
    """Return the arguments of `target(*args, **kwargs)` by name.

    Args:
        target: a class, or any callable.
        args: positional arguments.
        kwargs: keyword arguments.
        defaults: include the defaults of the signature.
    """
    own = [None] if inspect.isclass(target) else []  # self
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        bound = inspect.signature(function).bind_partial(*own, *args, **kwargs)
    except (TypeError, ValueError):  # the call itself will raise a better message
        return dict(kwargs)
    if defaults:
        bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[len(own) :]:
        kind = bound.signature.parameters[name].kind
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return found
