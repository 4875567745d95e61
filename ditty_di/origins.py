"""Distinguish the user's own code from installed packages."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
from typing import Any


@functools.cache
def _installed() -> tuple[str, ...]:
    """Return the folders of installed packages and of the standard library."""
    paths = sysconfig.get_paths()
    found = {paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]}
    found |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(os.path.realpath(path) + os.sep for path in sorted(found))


def is_installed(file: str) -> bool:
    """Return whether a source file is of Python or of an installed package."""
    return os.path.realpath(file).startswith(_installed())


def is_users_own(obj: Any) -> bool:
    """Return whether a class or function was defined in a file outside of installed packages."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    return file is not None and not is_installed(file)
