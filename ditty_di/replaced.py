"""Give a name another value for a while."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

_MISSING: Any = object()


@contextmanager
def replaced(namespace: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    """Replace what a namespace has under a name, or lacks, within the context.

    Args:
        namespace: such as `vars(module)`, `sys.modules` or `os.environ`.
        name: the name.
        value: its value meanwhile.
    """
    before = namespace.get(name, _MISSING)
    namespace[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            del namespace[name]
        else:
            namespace[name] = before
