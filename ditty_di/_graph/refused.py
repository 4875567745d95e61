"""Targets that a configuration may not call unless the user allows them by name.

They run commands, evaluate text, load pickles, write files, call what they are handed, or reach
into the interpreter. This is defence in depth against a configuration from elsewhere, as Hydra's
own policy is, and not a sandbox: a configuration is code (see README).
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ditty_di.origins import is_users_own

# Each name stands for itself and everything below it.
_NAMES = """
asyncio bdb cProfile cffi
cloudpickle codeop concurrent.futures ctypes dill doctest ensurepip frozen_importlib
frozen_importlib_external gc imp importlib inspect logging.config marshal multiprocessing
os pdb pexpect pickle pip pkg_resources posixsubprocess profile pty ptyprocess pydoc runpy shelve
subprocess sys timeit trace unittest.mock venv yaml

annotationlib code.InteractiveConsole code.InteractiveInterpreter code.compile_command code.interact
dataclasses.make_dataclass hydra._internal.utils._locate joblib optparse.Values
pandas.io.pickle pandas.read_pickle tracemalloc.Snapshot

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

thread.start_new_thread thread.start_new threading sched atexit signal faulthandler webbrowser
idlelib lib2to3 compileall py_compile zipimport site zipapp turtledemo antigravity
xmlrpc http.server socketserver socket ssl ftplib smtplib poplib imaplib telnetlib urllib.request

builtins.open io codecs.open fileinput shutil tempfile sqlite3 dbm gdbm ndbm zipfile tarfile
gzip bz2 lzma mailbox wave plistlib.dump linecache logging.FileHandler logging.handlers
logging.basicConfig configparser.RawConfigParser.write csv.writer pathlib._local.Path.write_text

builtins.code builtins.function copyreg rlcompleter readline pipes tkinter turtle curses mmap
pstats test.support test.libregrtest http.client nntplib asyncore asynchat smtpd wsgiref cgi cgitb
argparse.FileType resource.setrlimit resource.prlimit sysconfig._generate_posix_vars uu

numpy.ctypeslib numpy.lib._datasource numpy.lib.npyio.DataSource numpy.lib.format.open_memmap
pandas.read_sql pandas.read_sql_query pandas.read_sql_table pandas.read_clipboard pandas.read_hdf
pandas.io.common.get_handle datasets.load.import_main_class datasets.utils._dill
datasets.download.download_manager.DownloadManager datasets.utils.extract
transformers.testing_utils transformers.utils.import_utils.direct_transformers_import
huggingface_hub multiprocess pathos psutil.Process psutil.Popen click typer urllib3 tyro mypy
attr.make_class attrs.make_class attr._make.make_class PIL.ImageShow PIL.Image.Image.show
pyarrow.OSFile pyarrow.lib.OSFile pyarrow.memory_map pyarrow.lib.memory_map pyarrow.output_stream
pyarrow.lib.output_stream pyarrow.create_memory_map pyarrow.lib.create_memory_map tensorboard.main
torchtitan.train.main

torch.from_file torch._VariableFunctionsClass.from_file builtins.StorageBase.from_file
torch.storage.UntypedStorage.from_file torch.storage.TypedStorage.from_file torch.FloatStorage
torch.storage._load_from_bytes torch.PyTorchFileWriter torch.utils.hipify torch.utils.file_baton
torch._C._load_for_lite_interpreter torch._C._load_mobile_module_from_file
torch._C.import_ir_module torch._C.import_ir_module_from_buffer torch._C.PyTorchFileWriter
torch.distributed.FileStore torch.distributed.TCPStore torch._C._distributed_c10d.FileStore
torch._C._distributed_c10d.TCPStore torch.distributed.nn.jit torch.distributed.checkpoint.load
torch.distributed.checkpoint.state_dict_loader torch.distributed.checkpoint.filesystem
torch.distributed.distributed_c10d._tensor_to_object

setuptools distutils pkgutil.resolve_name pkgutil.walk_packages pytest Cython numpy.f2py
numpy.distutils numpy.testing numpy.memmap numpy.fromregex numexpr pandas.eval pandas.io.sql
pandas.core.computation pandas.core.frame.DataFrame.eval pandas.core.frame.DataFrame.query
pandas.io.clipboards pandas.io.pytables pandas.HDFStore pandas.ExcelWriter pyarrow.fs
sympy mako jinja2 chevron asteval simpleeval RestrictedPython fabric paramiko
requests httpx aiohttp fsspec gdown wget IPython ipykernel notebook jupyter ray dask celery
submitit tensorboard.program triton.compile triton.tools

torch.hub torch.multiprocessing torch.distributed.run torch.distributed.launch
torch.distributed.launcher torch.distributed.elastic torch.distributed.rpc
torch.distributed.checkpoint.format_utils torch.utils.collect_env torch.utils.cpp_extension
torch.utils.bottleneck torch.utils.model_zoo torch.utils.mobile_optimizer
torch.utils._config_module torch.utils.show_pickle torch.utils.benchmark
torch._inductor torch._dynamo torch._export torch._C._jit_ torch.fx torch.package torch.jit
torch.onnx torch.export torch.classes.load_library torch.ops.load_library torch.testing torchgen
torch.serialization.add_safe_globals torch.serialization.safe_globals
torch._weights_only_unpickler torch.cuda.memory torch.compiler.load_cache_artifacts
accelerate.commands accelerate.launchers accelerate.notebook_launcher accelerate.debug_launcher
transformers.dynamic_module_utils transformers.commands transformers.cli transformers.agents
transformers.utils.cached_file datasets.utils.py_utils datasets.packaged_modules
hydra.main hydra.initialize hydra.compose hydra.utils.instantiate hydra.utils.call
hydra.utils.get_method hydra.utils.get_class hydra.utils.get_object hydra.utils.get_static_method
hydra._internal hydra.core omegaconf.OmegaConf.save omegaconf.OmegaConf.register_new_resolver
omegaconf.OmegaConf.register_resolver omegaconf.OmegaConf.clear_resolvers
ditty_di.__main__ ditty_di.cli ditty_di.launch.__main__ ditty_di.launch.worker
ditty_di.launch.processes ditty_di.launch.warm ditty_di.launch.sweep.job ditty_di.launch.sweep.run
"""
_ALLOWED_NAMES = """
importlib.metadata.version importlib.resources io.BytesIO io.StringIO os._Environ.get os.cpu_count
os.environ.get os.fspath os.getcwd os.getenv os.getpid os.listdir os.makedirs os.mkdir os.path
os.process_cpu_count os.sched_getaffinity os.urandom signal.Signals sys.getrecursionlimit
huggingface_hub.hf_hub_download huggingface_hub.file_download.hf_hub_download
huggingface_hub.snapshot_download huggingface_hub._snapshot_download.snapshot_download
huggingface_hub.hub_mixin huggingface_hub.PyTorchModelHubMixin
sys.getsizeof threading.Lock threading.RLock yaml.safe_dump yaml.safe_dump_all yaml.safe_load
yaml.safe_load_all
"""
_HIDDEN_NAMES = """
__annotate__ __annotations__ __base__ __bases__ __builtins__ __class__ __closure__ __code__
__defaults__ __dict__ __getattribute__ __globals__ __kwdefaults__ __mro__ __reduce__ __reduce_ex__
__subclasses__ f_builtins f_globals f_locals
"""
# Functions and methods that write, send or delete, told by their own name. They are refused in
# installed packages and in the standard library, not in modules of the user's own.
_VERBS = re.compile(
    r"(save|write|dump|upload|urlretrieve|unlink|rmdir|rename|symlink|hardlink|link_to|chmod|lchmod"
    r"|touch|push|copyfile|copytree|extractall|to_(csv|json|parquet|pickle|sql|excel|hdf"
    r"|feather|stata|html|file))(_\w+)?|tofile|savetxt|savez\w*|delete_\w+|create_repo|hardlink_to|symlink_to"
    r"|(im|mm|f)(save|write)|save(mat|fig|_\w+)"
)
_PATH_METHODS = frozenset(["open", "replace", "mkdir"])
#: Values of arguments that turn a harmless function into one that unpickles or runs code.
UNSAFE_ARGUMENTS: Mapping[str, object] = {
    "weights_only": False,
    "allow_pickle": True,
    "trust_remote_code": True,
    "shell": True,
    "use_pickle": True,
}
#: The same of single targets, by the place where they are defined: builders that unpickle.
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

_REFUSED = frozenset(_NAMES.split())
_ALLOWED = frozenset(_ALLOWED_NAMES.split())
_HIDDEN = frozenset(_HIDDEN_NAMES.split())
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
    """Return whether a callable is refused by the names it was defined under, by its own name (a
    verb that writes) or by what its own code calls; the last two not in the user's own modules."""
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
    """Return `name=value` of an argument, given or by default, that lets `fn` load pickles or run
    code; None when there is none."""
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
    """The functions that calling an object runs first; for a class, its constructor."""
    obj = _unwrapped(obj)
    functions = [obj]
    if isinstance(obj, type):
        functions = [_attribute(obj, name) for name in ("__new__", "__init__")]
    for function in functions:
        for _ in range(16):
            function = _attribute(function, "__func__") or function
            if isinstance(function, types.FunctionType):
                yield function
            wrapped = _attribute(function, "__wrapped__")
            if wrapped is None or wrapped is function:
                break
            function = wrapped


def _is_risky(obj: Any) -> bool:
    safeguarded = not UNSAFE_ARGUMENTS.keys().isdisjoint(_parameters(obj))
    return any(
        (not safeguarded and _calls_what_is_refused(f.__code__, _risky_globals(f)))
        or _opens_to_write(f)
        for f in _functions(obj)
    )


def _risky_globals(function: types.FunctionType) -> frozenset[str]:
    """Names that mean something risky in a function: builtins, and what its module imported from
    risky modules, under whatever name."""
    names, found = function.__code__.co_names, set(_RISKY_BUILTINS.difference(function.__globals__))
    for name in names:
        value = function.__globals__.get(name)
        module = value.__name__ if isinstance(value, types.ModuleType) else None
        if callable(value):
            module = _attribute(value, "__module__")
        harmless = isinstance(value, type) and issubclass(value, BaseException)
        if isinstance(module, str) and module.partition(".")[0] in _RISKY_MODULES and not harmless:
            found.add(name)
    return frozenset(found)


def _opens_to_write(function: types.FunctionType) -> bool:
    code = function.__code__
    if "open" not in code.co_names or "open" in function.__globals__:
        return False
    return any(isinstance(c, str) and _WRITING.fullmatch(c) for c in _constants(code))


def _constants(code: types.CodeType) -> Iterator[object]:
    for constant in code.co_consts:
        yield from _constants(constant) if isinstance(constant, types.CodeType) else (constant,)


def _parameters(obj: Any) -> Collection[str]:
    try:
        return inspect.signature(obj).parameters
    except (TypeError, ValueError):
        return ()


@functools.lru_cache(maxsize=4096)
def _calls_what_is_refused(code: types.CodeType, builtin: frozenset[str]) -> bool:
    for instruction in dis.get_instructions(code):
        name, told = instruction.argval, instruction.opname
        if not isinstance(name, str):
            continue
        if told in ("LOAD_GLOBAL", "LOAD_NAME") and name in builtin | _RISKY_MODULES:
            return True
        if told == "IMPORT_NAME" and name.partition(".")[0] in _RISKY_MODULES:
            return True
        if told in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") and name in _RISKY_ATTRIBUTES:
            return True
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return any(_calls_what_is_refused(constant, builtin) for constant in inner)
