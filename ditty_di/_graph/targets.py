"""What a `_target_` names, and whether a configuration may name it.

Knows Python callables only: nothing here has seen a configuration, and nothing is called.
"""

from __future__ import annotations

import builtins
import difflib
import importlib
import pkgutil
import sys
import types
from collections.abc import Callable, Collection, Iterable
from typing import Any

from ditty_di._graph.refused import REASON, identities, is_hidden, is_refused, is_refused_callable

#: The keys of a node that are no arguments.
SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


class TargetError(Exception):
    """A target that cannot be imported or may not be named."""


#: Modules of the standard library that can be imported on Windows alone.
_OF_WINDOWS = {"msilib", "msvcrt", "nt", "winreg", "winsound"}


def did_you_mean(word: str, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?`, or nothing when no name is close."""
    close = difflib.get_close_matches(word, [name for name in known if isinstance(name, str)], 1)
    near = close and difflib.SequenceMatcher(None, word, close[0]).ratio() >= cutoff
    return f"; did you mean {close[0]!r}?" if near else ""


# ----------------------------------------------------------------------------------- importing
def locate(name: str, allowed: Collection[str] = ()) -> Callable[..., Any]:
    """Return the callable that a dotted path names, importing as needed.

    `allowed` names targets that would be refused otherwise, by the path or by where they are
    defined.

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
                message = f"{'.'.join(parts[:n])!r} has no attribute {part!r}"
                raise TargetError(
                    f"cannot find {name!r}: {message}{did_you_mean(part, dir(obj))}"
                ) from None
            obj = _import(name, ".".join(parts[: n + 1]), obj)
        except Exception as error:  # lazy modules raise what they like
            raise TargetError(
                f"cannot import {name!r}: {type(error).__name__}: {_first_line(error)}"
            ) from error
        canonical = f"{canonical}.{part}"
    trusted = trusted or not identities(obj).isdisjoint(allowed)
    refused = is_refused(canonical) or is_refused_callable(obj)
    if is_hidden(canonical) or (refused and not trusted):
        why = REASON.format(name=name)
        raise TargetError(f"target {name!r} is refused: it is {canonical!r}, which {why}")
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
            raise TargetError(
                f"cannot import {name!r}: {module!r} needs the module {error.name!r}, "
                "which is not installed"
            ) from error
        last = module.rpartition(".")[2]
        if parent is None:
            known = {m.name for m in pkgutil.iter_modules()} | set(sys.stdlib_module_names)
            hint = (
                did_you_mean(last, known - _OF_WINDOWS) or "; is it installed in this environment?"
            )
            raise TargetError(f"cannot import {name!r}: no module {module!r}{hint}") from None
        below = {m.name for m in pkgutil.iter_modules(getattr(parent, "__path__", ()))}
        raise TargetError(
            f"cannot find {name!r}: module {parent.__name__!r} has no attribute {last!r}"
            f"{did_you_mean(last, below | set(dir(parent)))}"
        ) from None
    except Exception as error:
        raise TargetError(
            f"cannot import {name!r}: importing {module!r} raised "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "(no message)")
