"""Import what a `_target_` names, and refuse what a configuration may not name.

Knows Python callables only: nothing here has seen a configuration, and nothing is called.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from ditty_di.config.policy import REASON, identities, is_hidden, is_refused, is_refused_callable
from ditty_di.messages import did_you_mean

#: The keys of a node that are no arguments: (whether a value is right, what to write instead).
SPECIAL: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "_target_": (lambda value: isinstance(value, str), "write a dotted path"),
    "_partial_": (lambda value: isinstance(value, bool), "write true or false"),
    "_args_": (lambda value: isinstance(value, list), "write a list of positional arguments"),
    "_convert_": (
        lambda value: value in ("all", "object", "partial"),
        "constructors are given plain mappings and lists; leave it out",
    ),
    "_recursive_": (
        lambda value: value is True,
        "the nodes in a node are always built; leave it out",
    ),
}

# Modules of the standard library that can be imported on Windows only.
_WINDOWS_MODULES = {"msilib", "msvcrt", "nt", "winreg", "winsound"}


class TargetError(Exception):
    """A target that cannot be imported, or that a configuration may not name."""


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Import without collecting garbage: what modules make stays, and looking takes a second."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_collecting()
def locate(name: str, allowed: Collection[str] = ()) -> Callable[..., Any]:
    """Import the callable that a dotted path names.

    Args:
        name: the dotted path.
        allowed: targets that are refused otherwise, as written or as defined.

    Raises:
        TargetError: it cannot be imported, is not callable, or is refused; says what to write.
    """
    parts = name.split(".")
    if len(parts) < 2 or not all(parts):
        builtin = f"; did you mean 'builtins.{name}'?" if hasattr(builtins, name) else ""
        raise TargetError(f"{name!r} is not a dotted path such as 'torch.optim.AdamW'{builtin}")
    trusted = name in allowed and not is_hidden(name)
    if is_refused(name) and not trusted:
        raise TargetError(f"target {name!r} is refused: it {REASON.format(name=name)}")
    obj: Any = _import(name, parts[0], None)
    canonical = parts[0]
    for n, part in enumerate(parts[1:], 1):
        if isinstance(obj, types.ModuleType):
            canonical = obj.__name__  # so that `shutil.os.environ` is seen as `os.environ`
        try:
            obj = getattr(obj, part)
        except AttributeError:
            if not isinstance(obj, types.ModuleType):
                message = f"cannot find {name!r}: {'.'.join(parts[:n])!r} has no attribute {part!r}"
                raise TargetError(f"{message}{did_you_mean(part, dir(obj))}") from None
            obj = _import(name, ".".join(parts[: n + 1]), obj)
        except Exception as error:  # lazy modules raise what they like
            raise TargetError(f"cannot import {name!r}: {_summary(error)}") from error
        canonical = f"{canonical}.{part}"
    trusted = trusted or not identities(obj).isdisjoint(allowed)
    refused = is_refused(canonical) or is_refused_callable(obj)
    if is_hidden(canonical) or (refused and not trusted):
        reason = REASON.format(name=name)
        raise TargetError(f"target {name!r} is refused: it is {canonical!r}, which {reason}")
    if not callable(obj):
        hint = ""
        if isinstance(obj, types.ModuleType):
            inside = [parts[-1], *(k for k in vars(obj) if not k.startswith("_"))]
            own = [k for k in inside if getattr(getattr(obj, k, None), "__module__", "") == name]
            hint = f"; did you mean {f'{name}.{own[0]}'!r}?" if own else ""
        raise TargetError(f"{name!r} is a {type(obj).__name__}, which cannot be called{hint}")
    return obj  # type: ignore[no-any-return]


def _import(name: str, module: str, parent: types.ModuleType | None) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            message = f"{module!r} needs the module {error.name!r}, which is not installed"
            raise TargetError(f"cannot import {name!r}: {message}") from error
    except Exception as error:
        message = f"importing {module!r} raised {_summary(error)}"
        raise TargetError(f"cannot import {name!r}: {message}") from error
    last = module.rpartition(".")[2]
    if parent is None:
        known = {m.name for m in pkgutil.iter_modules()} | set(sys.stdlib_module_names)
        near = did_you_mean(last, known - _WINDOWS_MODULES)
        hint = _extra_with(last) or near or "; is it installed in this environment?"
        raise TargetError(f"cannot import {name!r}: no module {module!r}{hint}")
    below = {m.name for m in pkgutil.iter_modules(getattr(parent, "__path__", ()))}
    hint = did_you_mean(last, below | set(dir(parent)))
    message = f"module {parent.__name__!r} has no attribute {last!r}"
    raise TargetError(f"cannot find {name!r}: {message}{hint}")


def _extra_with(module: str) -> str:
    """Return how to install a module that an extra of ditty_di brings; "" for any other."""
    wanted = re.compile(rf"{re.escape(module)}\b.*extra == ['\"](\w+)['\"]")
    try:
        found = map(wanted.match, metadata.requires("ditty_di") or ())
    except metadata.PackageNotFoundError:  # run from a folder of source
        return ""
    extra = next((match[1] for match in found if match), None)
    return f"; pip install 'ditty_di[{extra}]'" if extra else ""


def _summary(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "(no message)")
    return f"{type(error).__name__}: {first}"
