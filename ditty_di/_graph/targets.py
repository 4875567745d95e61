"""What a `_target_` names, and whether a configuration may name it.

Knows Python callables only: nothing here has seen a configuration, and nothing is called.
"""

from __future__ import annotations

import builtins
import difflib
import functools
import importlib
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

#: The keys of a node that are no arguments.
SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


class TargetError(Exception):
    """A target that cannot be imported or may not be named."""


def did_you_mean(word: str, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?`, or nothing when no name is close."""
    close = difflib.get_close_matches(word, [name for name in known if isinstance(name, str)], 1)
    near = close and difflib.SequenceMatcher(None, word, close[0]).ratio() >= cutoff
    return f"; did you mean {close[0]!r}?" if near else ""


# ----------------------------------------------------------------------------- refused targets
# Targets that run commands, evaluate text, unpickle, call what the configuration hands them, or
# reach into the interpreter. Each name stands for itself and everything below it. Defence in depth
# against a configuration from elsewhere, as Hydra's own policy is, and no sandbox.
_REFUSED_NAMES = """
asyncio.create_subprocess_exec asyncio.create_subprocess_shell asyncio.subprocess bdb cProfile cffi
cloudpickle codeop concurrent.futures ctypes dill doctest ensurepip frozen_importlib
frozen_importlib_external gc imp importlib inspect logging.config marshal multiprocessing.Pool
multiprocessing.Process multiprocessing.context.Process multiprocessing.pool multiprocessing.process
os pdb pexpect pickle pip pkg_resources posixsubprocess profile pty ptyprocess pydoc runpy shelve
subprocess sys timeit trace unittest.mock venv yaml

annotationlib code.InteractiveConsole code.InteractiveInterpreter code.compile_command code.interact
dataclasses.make_dataclass hydra._internal.utils._locate joblib.load optparse.Values
pandas.io.pickle pandas.read_pickle shutil.chown shutil.move shutil.rmtree tracemalloc.Snapshot

builtins.__build_class__ builtins.__import__ builtins.breakpoint builtins.classmethod
builtins.compile builtins.delattr builtins.eval builtins.exec builtins.exit builtins.filter
builtins.frame builtins.getset_descriptor builtins.globals builtins.help builtins.input
builtins.locals builtins.map builtins.member_descriptor builtins.property builtins.quit
builtins.setattr builtins.staticmethod builtins.str.format builtins.str.format_map builtins.type
builtins.vars collections.UserString.format collections.UserString.format_map sitebuiltins

abc.abstractclassmethod abc.abstractmethod abc.abstractproperty abc.abstractstaticmethod
contextlib.AsyncContextDecorator contextlib.ContextDecorator contextlib.asynccontextmanager
contextlib.contextmanager enum.DynamicClassAttribute enum.property functools.cache
functools.cached_property functools.lru_cache functools.partial.__call__ functools.partialmethod
functools.reduce functools.singledispatch functools.singledispatchmethod functools.update_wrapper
functools.wraps itertools.accumulate itertools.dropwhile itertools.filterfalse itertools.groupby
itertools.starmap itertools.takewhile types.ClassMethodDescriptorType types.CodeType
types.DynamicClassAttribute types.FunctionType types.MethodDescriptorType types.MethodType
types.WrapperDescriptorType types.coroutine types.new_class types.prepare_class

asyncio.Task.get_stack asyncio.base_tasks asyncio.tasks.Task.get_stack logging.Formatter
logging.StrFormatStyle operator.attrgetter operator.call operator.contains operator.delitem
operator.getitem operator.itemgetter operator.methodcaller operator.setitem string.Formatter
traceback.clear_frames traceback._walk_tb_with_full_positions traceback.walk_stack traceback.walk_tb
typing.ForwardRef typing._eval_type typing.evaluate_forward_ref typing.get_type_hints
"""
_ALLOWED_NAMES = """
importlib.metadata.version importlib.resources os._Environ.get os.cpu_count os.environ.get os.fspath
os.getcwd os.getenv os.getpid os.listdir os.makedirs os.mkdir os.path os.process_cpu_count
os.sched_getaffinity os.urandom sys.getrecursionlimit sys.getsizeof yaml.safe_dump
yaml.safe_dump_all yaml.safe_load yaml.safe_load_all
"""
_HIDDEN_NAMES = """
__annotate__ __annotations__ __base__ __bases__ __builtins__ __class__ __closure__ __code__
__defaults__ __dict__ __getattribute__ __globals__ __kwdefaults__ __mro__ __reduce__ __reduce_ex__
__subclasses__ f_builtins f_globals f_locals
"""
_REFUSED = frozenset(_REFUSED_NAMES.split())
_ALLOWED = frozenset(_ALLOWED_NAMES.split())
_HIDDEN = frozenset(_HIDDEN_NAMES.split())
_OTHER_NAMES = {"posix": "os", "nt": "os", "posixpath": "os.path", "ntpath": "os.path"}
_WHY = (
    "runs commands, evaluates text or reaches into the interpreter, and so is not for a "
    "configuration to call: name a function of your own that does it"
)


def is_refused(name: str) -> bool:
    """Whether a dotted name is, or lies below, one that configurations may not call."""
    parts = name.split(".")
    if not _HIDDEN.isdisjoint(parts):
        return True
    module = parts[0].lstrip("_")  # _pickle, _operator, ...: the same functions in C
    parts[:1] = _OTHER_NAMES.get(module, module).split(".")
    above = {".".join(parts[: n + 1]) for n in range(len(parts))}
    return not above.isdisjoint(_REFUSED) and above.isdisjoint(_ALLOWED)


def _identities(obj: Any) -> set[str]:
    """The names under which an object was defined, whatever it was imported as."""

    def attribute(name: str) -> Any:
        try:
            return getattr(obj, name, None)
        except Exception:  # objects that compute their attributes raise what they like
            return None

    for _ in range(16):  # partials of partials; bounded, for an object may name itself
        if isinstance(obj, functools.partial):
            obj = obj.func
        elif attribute("__name__") == "__call__" and callable(attribute("__self__")):
            obj = obj.__self__
        else:
            break
    name = attribute("__qualname__")
    if not isinstance(name, str):
        return {f"{type(obj).__module__}.{type(obj).__qualname__}"}
    names = {f"{attribute('__module__') or 'builtins'}.{name}"}
    owner = attribute("__objclass__") or attribute("__self__")
    owner = owner if isinstance(owner, type) or owner is None else type(owner)
    if owner is not None and owner is not types.ModuleType:
        names.add(f"{owner.__module__}.{owner.__qualname__}.{attribute('__name__')}")
    return names


def is_refused_object(obj: Any) -> bool:
    """Whether an object that a node returned is one that a configuration may not hold.

    A refused callable, a module, a code object or frame, or a module's namespace.
    """
    if isinstance(obj, types.ModuleType | types.CodeType | types.FrameType | types.TracebackType):
        return True
    if type(obj) is dict:
        return any(getattr(m, "__dict__", None) is obj for m in list(sys.modules.values()))
    return callable(obj) and any(map(is_refused, _identities(obj)))


# ----------------------------------------------------------------------------------- importing
def locate(name: str) -> Callable[..., Any]:
    """The callable that a dotted path names, importing as needed.

    Raises:
        TargetError: it cannot be imported, is not callable, or is refused; says what to write.
    """
    parts = name.split(".")
    if len(parts) < 2 or not all(parts):
        builtin = f"; did you mean 'builtins.{name}'?" if hasattr(builtins, name) else ""
        raise TargetError(f"{name!r} is not a dotted path such as 'torch.optim.AdamW'{builtin}")
    if is_refused(name):
        raise TargetError(f"target {name!r} is refused: it {_WHY}")
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
    if is_refused(canonical) or any(map(is_refused, _identities(obj))):
        raise TargetError(f"target {name!r} is refused: it is {canonical!r}, which {_WHY}")
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
            hint = did_you_mean(last, known) or "; is it installed in this environment?"
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
