"""What a `_target_` names, whether a configuration may name it, and which arguments it takes.

Knows Python callables only: nothing here has seen a configuration, and nothing is called.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ditty_di import protocols

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


# ---------------------------------------------------------------------------------- signatures
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

    def _unknown(self, name: str) -> Misfit | None:
        if name in self._named:
            return None
        known = [*self._named, *SPECIAL]
        if self._takes_any:  # then only a name that looks misspelled is suspicious
            hint = did_you_mean(name, [k for k in known if _looks_like(k, name)], cutoff=0.85)
            return Misfit(name, f"looks like a misspelling{hint}") if hint else None
        if any(p.name == name for p in self._positional):
            return Misfit(name, "is a positional-only parameter: give it in _args_")
        return Misfit(name, f"is no parameter of it{did_you_mean(name, known)}")

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
        """Why a scalar is certainly not what a parameter annotated int, float or bool means."""
        parameter = self._parameter(argument)
        if parameter is None or isinstance(parameter.default, str):
            return ""
        members = set(self._members(parameter))
        if not members & {int, float, bool} or not members <= {int, float, bool, types.NoneType}:
            return ""
        wanted = " or ".join(sorted(m.__name__ for m in members if m is not types.NoneType))
        if isinstance(value, str):
            message = f"is the text {value!r}, and {wanted} is wanted"
            try:
                float(value)
            except ValueError:
                return message
            return f"{message}: write it without quotes (from a resolver: ${{oc.decode:...}})"
        if isinstance(value, float) and float not in members and value.is_integer():
            return f"is {value!r}, and {wanted} is wanted: write {int(value)}"
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
