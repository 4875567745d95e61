"""Import large libraries without what they import themselves and hardly ever call."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def exports(
    package: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose names are imported on first use.

    Args:
        package: its `globals()`.
        modules: the module of each name.
    """

    def attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return attribute, lambda: [*package, *modules]


class _Name:
    """A function or class whose module is imported when it is called or tested for instances."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    @property
    def _real(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._real)


class _Module(ModuleType):
    """Stands for a module, and imports it when asked for a name that was not announced."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` asks every module for some
            raise AttributeError(name)
        sys.modules.pop(self.__name__, None)
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def postponed(names: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Let what is imported inside this context not import the modules of `names` yet.

    Args:
        names: module -> the functions and classes that are imported from it and not called before
            the context ends.
    """
    stubs = {module: _Module(module) for module in names if module not in sys.modules}
    for module, stub in stubs.items():
        vars(stub).update({name: _Name(module, name) for name in names[module]})
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for module, stub in stubs.items():
            if sys.modules.get(module) is stub:
                del sys.modules[module]
