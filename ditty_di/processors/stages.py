"""Stages from what a pipeline is made of: built objects, or nodes that nobody has built.

A node is a mapping with `_target_`, as in a configuration. What its object's contract will be is
found, in this order, from

* `contract:` in the node;
* a `contract=` that the class's `__init__` has as default, or writes as a literal into its
  `super().__init__(...)`;
* `contract_for(**arguments)`, a class method that makes the text from the arguments, or the
  attribute `contract`: the one that is nearer to the class among its bases.

None of them: unchecked. A class whose objects consist of parts (a composite loss) has a class
method `parts_for(**arguments)` and its objects an attribute `parts`, both lists of (name, part);
`parts_argument` is the argument that they are given in.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ditty_di.config.targets import SPECIAL, TargetError, locate
from ditty_di.processors.base import as_contract, contract_of_class, snake_case
from ditty_di.processors.chain import LOADER, LOSS, MODEL, POST, PRE, Stage
from ditty_di.processors.contracts import Contract


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
    """All stages in order, each of them an object, a node, or None for one that is not known.

    A loader without a contract has that of its `collate_fn`, else that of its `dataset`. `key` is
    where the slots are in a configuration, such as `trainer`.
    """
    dotted = f"{key}." if key else ""
    first = _stage(LOADER, loader, f"{dotted}dataloader", loader_contract)
    for made_of in ("collate_fn", "dataset"):
        if first.contract is None and not first.error:
            inner = _stage(LOADER, argument(loader, made_of), first.key)
            first = Stage(LOADER, first.name, inner.contract, (), first.key, inner.error)
    return [
        first,
        *(_stage(PRE, p, f"{dotted}preprocessors.{n}") for n, p in enumerate(preprocessors)),
        _stage(
            MODEL,
            model,
            f"{dotted}model_contract" if model_contract else f"{dotted}model",
            model_contract,
        ),
        *(_stage(POST, p, f"{dotted}postprocessors.{n}") for n, p in enumerate(postprocessors)),
        _stage(LOSS, loss, f"{dotted}loss_fn"),
    ]


def _stage(kind: str, value: Any, key: str, contract: Any = None, name: str = "") -> Stage:
    """One stage; a contract that cannot be read is its `error`."""
    found: Contract | None = None
    parts: tuple[Stage, ...] = ()
    error = ""
    try:
        called, found = _of_node(value) if is_node(value) else _of_object(value)
        name = name or called
        inside: Any = None
        if kind == LOSS:
            at_node = is_node(value)
            inside = _call("parts_for", *_node(value)) if at_node else _attribute(value, "parts")
            within = getattr(_node(value)[0] if at_node else value, "parts_argument", None)
            inner = f"{key}.{within}" if within else key
            parts = tuple(_stage(kind, p, inner, None, called) for called, p in inside or ())
        found = as_contract(contract) or found
    except (ValueError, TypeError, TargetError) as failure:
        error = str(failure)
    return Stage(kind, name, found, parts, key, error)


def _of_object(value: Any) -> tuple[str, Contract | None]:
    if value is None:
        return "", None
    if callable(getattr(value, "func", None)) and hasattr(value, "keywords"):  # a partial
        return _of_call(value.func, value.args, value.keywords)
    name = _attribute(value, "name")
    called = name if isinstance(name, str) else type(value).__name__
    contract = _attribute(value, "contract")
    return called, as_contract(contract) if isinstance(contract, str | Contract) else None


def _of_node(node: Mapping[str, Any]) -> tuple[str, Contract | None]:
    target, kwargs = _node(node)
    return _of_call(target, (), kwargs)


def _of_call(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Contract | None]:
    # A method such as `from_pretrained` makes an object of its class.
    owner = getattr(target, "__self__", target)
    target = owner if inspect.isclass(owner) else target
    called = getattr(target, "__name__", type(target).__name__)
    if any(hasattr(target, method) for method in ("process", "contract_for", "parts_for")):
        called = snake_case(called)
    name = kwargs.get("name")  # what is not given is the class's
    positional = {"_args_": list(args)} if args else {}
    return (name if isinstance(name, str) else called), contract_of(
        target, {**positional, **kwargs}
    )


def contract_of(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> Contract | None:
    """The contract that `target(**kwargs)` will have, as far as it can be told without the call.

    `kwargs` may have `_args_`. None when nothing tells it.

    Raises:
        ContractError: there is one, and it cannot be read.
    """
    arguments = _arguments(target, kwargs)
    if arguments.get("contract") is not None:
        return as_contract(arguments["contract"])
    return contract_of_class(target, arguments) if inspect.isclass(target) else None


def _call(method: str, target: Any, kwargs: Mapping[str, Any]) -> Any:
    function = getattr(target, method, None)
    return function(**_arguments(target, kwargs)) if function is not None else None


def _arguments(target: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `target` gets by name: literals that it passes up, its defaults, and what is given."""
    arguments = _literals(target) if inspect.isclass(target) else {}
    given = {name: value for name, value in kwargs.items() if name not in SPECIAL}
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return {**arguments, **given}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if defaults.get("contract", "") is None:
        del defaults["contract"]  # then a literal counts
    in_order = dict(zip(positional, kwargs.get("_args_", ()), strict=False))
    return {**arguments, **defaults, **in_order, **given}


def _literals(cls: type) -> dict[str, Any]:
    """The keyword arguments that a class's own `__init__` writes out for its base's."""
    init = vars(cls).get("__init__")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(init)))  # type: ignore[arg-type]
    except (TypeError, OSError, SyntaxError):  # no source: defined in C, or at a prompt
        return {}
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            for keyword in node.keywords:
                if keyword.arg and isinstance(keyword.value, ast.Constant):
                    found[keyword.arg] = keyword.value.value
    return found


def is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _node(node: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The target of a node, and its arguments with `_args_`."""
    kept = {name: value for name, value in node.items() if name == "_args_" or name not in SPECIAL}
    name = str(node["_target_"])
    target = locate(name, allowed=(name,))  # the graph was checked before
    owner = getattr(target, "__self__", target)
    return (owner if inspect.isclass(owner) else target), kept


def argument(value: Any, name: str) -> Any:
    """What a node, a partial or an object has under a name."""
    if is_node(value):
        return _arguments(*_node(value)).get(name)
    if callable(getattr(value, "func", None)) and hasattr(value, "keywords"):
        given = {"_args_": list(value.args), **value.keywords}
        return _arguments(value.func, given).get(name)
    return _attribute(value, name)


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, None)
