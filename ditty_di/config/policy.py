"""Refuse targets that a configuration may not call unless the user allows them by name.

The names are in `refused_targets.yaml`. Such targets run commands, evaluate text, load pickles,
write files, call what they are handed, or reach into the interpreter. This is defense in depth
against a configuration from elsewhere, as Hydra's own policy is, and not a sandbox: a configuration
is code (see README).
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ditty_di.origins import is_users_own

# Names of functions and methods that write, send or delete. They are refused in installed packages
# and in the standard library, not in the user's own modules.
_VERBS = re.compile(
    r"(save|write|dump|upload|urlretrieve|unlink|rmdir|rename|symlink|hardlink|link_to|chmod|lchmod"
    r"|touch|push|copyfile|copytree|extractall|to_(csv|json|parquet|pickle|sql|excel|hdf"
    r"|feather|stata|html|file))(_\w+)?|tofile|savetxt|savez\w*|delete_\w+|create_repo|hardlink_to"
    r"|symlink_to"
    r"|(im|mm|f)(save|write)|save(mat|fig|_\w+)"
)
_PATH_METHODS = frozenset(["open", "replace", "mkdir"])
#: Argument values that make a harmless function unpickle or run code.
UNSAFE_ARGUMENTS: Mapping[str, object] = {
    "weights_only": False,
    "allow_pickle": True,
    "trust_remote_code": True,
    "shell": True,
    "use_pickle": True,
}
#: The same for single targets, by the name they were defined under: builders that unpickle.
_UNSAFE_VALUES: Mapping[str, Mapping[str, Collection[str]]] = {
    "datasets.load.load_dataset": {"path": ("pandas",)},
    "datasets.load.load_dataset_builder": {"path": ("pandas",)},
}
# What a function's own code may not call, outside the user's own modules.
_RISKY_BUILTINS = frozenset(("exec", "eval", "compile", "__import__"))
_RISKY_MODULES = frozenset(
    ("subprocess", "pickle", "_pickle", "cloudpickle", "dill", "marshal", "runpy", "pty")
)
_RISKY_ATTRIBUTES = frozenset(("Popen", "popen", "system", "execv", "execve", "spawnl", "spawnv"))
_WRITING = re.compile(r"[wax](b|t)?\+?(b|t)?|r(b|t)?\+(b|t)?")  # modes of `open`

_DATA = yaml.safe_load(Path(__file__).with_name("refused_targets.yaml").read_text("utf-8"))
_REFUSED = frozenset(_DATA["hydra"] + _DATA["more"])
_ALLOWED = frozenset(_DATA["allowed"])
_HIDDEN = frozenset(_DATA["hidden"])
_OTHER_NAMES = {"posix": "os", "nt": "os", "posixpath": "os.path", "ntpath": "os.path"}
REASON = (
    "runs commands, evaluates text, loads pickles, writes files or reaches into the interpreter. "
    "Name a function of your own that does it, or, if you trust this configuration, type "
    "'allow_targets=[{name}]'"
)


def is_refused(name: str) -> bool:
    """Return whether a dotted name is, or lies below, one that configurations may not call."""
    parts = name.split(".")
    if not _HIDDEN.isdisjoint(parts):
        return True
    module = parts[0].lstrip("_")  # _pickle, _operator, ...: the same functions in C
    parts[:1] = _OTHER_NAMES.get(module, module).split(".")
    above = {".".join(parts[: n + 1]) for n in range(len(parts))}
    return not above.isdisjoint(_REFUSED) and above.isdisjoint(_ALLOWED)


def refusal(target: str, argument: str) -> str:
    """Return the message about an argument that makes a target unsafe."""
    return (
        f"{target} with {argument} is refused: it loads pickles or runs code that comes with the "
        f"data. Leave {argument} out or, if you trust the source, type "
        f"'allow_targets=[{target}]'"
    )


def is_hidden(name: str) -> bool:
    """Return whether a dotted name reaches into the interpreter, which nothing may allow."""
    return not _HIDDEN.isdisjoint(name.split("."))


def identities(obj: Any) -> set[str]:
    """Return the names under which an object was defined, whatever it was imported as."""
    obj = _unwrapped(obj)
    name = _attribute(obj, "__qualname__")
    if not isinstance(name, str):
        return {f"{type(obj).__module__}.{type(obj).__qualname__}"}
    names = {f"{_attribute(obj, '__module__') or 'builtins'}.{name}"}
    owner = _attribute(obj, "__objclass__") or _attribute(obj, "__self__")
    owner = owner if isinstance(owner, type) or owner is None else type(owner)
    if owner is not None and owner is not types.ModuleType:
        names.add(f"{owner.__module__}.{owner.__qualname__}.{_attribute(obj, '__name__')}")
    return names


def is_refused_callable(obj: Any) -> bool:
    """Return whether a callable is refused by name, or by what its own code calls.

    The names are those it was defined under. A name such as `save`, and the code, do not count in
    the user's own modules.
    """
    names = identities(obj)
    if any(map(is_refused, names)):
        return True
    if is_users_own(_unwrapped(obj)):
        return False
    return any(map(_writes, names)) or _is_risky(obj)


def is_refused_object(obj: Any, allowed: Collection[str] = ()) -> bool:
    """Return whether an object that a node returned is one that a configuration may not hold.

    A refused callable, a module, a code object or frame, or a module's namespace.
    """
    if isinstance(obj, types.ModuleType | types.CodeType | types.FrameType | types.TracebackType):
        return True
    if type(obj) is dict:
        return any(getattr(m, "__dict__", None) is obj for m in list(sys.modules.values()))
    if not callable(obj) or not identities(obj).isdisjoint(allowed):
        return False
    if not isinstance(obj, type) and _attribute(obj, "__code__") is None and _is_instance(obj):
        return any(map(is_refused, identities(obj)))  # an object with __call__, already built
    return is_refused_callable(obj)


def unsafe_argument(
    fn: Callable[..., Any], args: Collection[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Return `name=value` of an argument that lets `fn` load pickles or run code, or None.

    Args:
        fn: the callable; its defaults count.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    given: dict[str, Any] = dict(kwargs)
    try:
        signature = inspect.signature(fn)
        given = {p.name: p.default for p in signature.parameters.values()}
        bound = signature.bind_partial(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    except (TypeError, ValueError):
        given.update(kwargs)
    for name, value in UNSAFE_ARGUMENTS.items():
        found = given.get(name)
        if isinstance(found, bool | int | str) and bool(found) is value:  # tested for truth
            return f"{name}={found!r}"
    for target in identities(fn) & _UNSAFE_VALUES.keys():
        for name, values in _UNSAFE_VALUES[target].items():
            if given.get(name) in values:
                return f"{name}={given[name]!r}"
    return None


def _unwrapped(obj: Any) -> Any:
    for _ in range(16):  # partials of partials; bounded, for an object may name itself
        if isinstance(obj, functools.partial):
            obj = obj.func
        elif _attribute(obj, "__name__") == "__call__" and callable(_attribute(obj, "__self__")):
            obj = obj.__self__
        else:
            break
    return obj


def _attribute(obj: Any, name: str) -> Any:
    try:
        return getattr(obj, name, None)
    except Exception:  # objects that compute their attributes raise what they like
        return None


def _is_instance(obj: Any) -> bool:
    return not isinstance(_attribute(obj, "__qualname__"), str)


def _writes(name: str) -> bool:
    last = name.rpartition(".")[2]
    in_path = ".Path." in name or ".PosixPath." in name or ".WindowsPath." in name
    return bool(_VERBS.fullmatch(last)) or (in_path and last in _PATH_METHODS)


def _functions(obj: Any) -> Iterator[types.FunctionType]:
    """Yield the functions that calling an object runs first; for a class, its constructor."""
    obj = _unwrapped(obj)
    constructors = ("__new__", "__init__")
    called = [_attribute(obj, n) for n in constructors] if isinstance(obj, type) else [obj]
    for function in called:
        for _ in range(16):
            function = _attribute(function, "__func__") or function
            if isinstance(function, types.FunctionType):
                yield function
            wrapped = _attribute(function, "__wrapped__")
            if wrapped is None or wrapped is function:
                break
            function = wrapped


def _is_risky(obj: Any) -> bool:
    """Return whether the code that calling an object runs first evaluates, unpickles or writes."""
    try:
        parameters = inspect.signature(obj).parameters.keys()
    except (TypeError, ValueError):
        parameters = {}.keys()
    safeguarded = not UNSAFE_ARGUMENTS.keys().isdisjoint(parameters)
    return any(
        (not safeguarded and _calls_refused(f.__code__, f.__globals__)) or _opens_to_write(f)
        for f in _functions(obj)
    )


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _opens_to_write(function: types.FunctionType) -> bool:
    code = function.__code__
    if "open" not in code.co_names or "open" in function.__globals__:
        return False
    constants = (constant for inner in _codes(code) for constant in inner.co_consts)
    return any(isinstance(c, str) and _WRITING.fullmatch(c) for c in constants)


def _calls_refused(code: types.CodeType, scope: Mapping[str, Any]) -> bool:
    """Return whether code uses risky builtins, modules or attributes, under whatever name."""
    for inner in _codes(code):
        for instruction in dis.get_instructions(inner):
            name, operation = instruction.argval, instruction.opname
            if not isinstance(name, str):
                continue
            if operation in ("LOAD_GLOBAL", "LOAD_NAME") and _is_risky_global(name, scope):
                return True
            if operation == "IMPORT_NAME" and name.partition(".")[0] in _RISKY_MODULES:
                return True
            attribute = operation in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM")
            if attribute and name in _RISKY_ATTRIBUTES:
                return True
    return False


def _is_risky_global(name: str, scope: Mapping[str, Any]) -> bool:
    value = scope.get(name)
    if name in _RISKY_MODULES or (name in _RISKY_BUILTINS and name not in scope):
        return True
    if isinstance(value, type) and issubclass(value, BaseException):
        return False
    is_module = isinstance(value, types.ModuleType)
    module = _attribute(value, "__name__" if is_module else "__module__")
    callable_or_module = is_module or callable(value)
    return callable_or_module and str(module).partition(".")[0] in _RISKY_MODULES
