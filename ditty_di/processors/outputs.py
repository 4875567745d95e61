"""What a model returned, and which part of it is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def predicted(output: Any, index: int | str) -> Any:
    """The tensor that an index means in a model's output: tuple, list, mapping, or with attributes.

    Raises:
        LookupError: there is none; says what there is.
    """
    has: Any
    if isinstance(index, int):
        if hasattr(output, "shape"):
            if index == 0:
                return output
            has = "one tensor"
        else:
            values = list(output.values()) if isinstance(output, Mapping) else output
            try:
                return values[index]
            except (LookupError, TypeError):
                count = len(values) if hasattr(values, "__len__") else "no"
                has = f"{type(output).__name__} of {count} values"
    else:
        if isinstance(output, Mapping) and index in output:
            return output[index]
        if not hasattr(output, "shape") and hasattr(output, index):
            return getattr(output, index)
        names = list(output) if isinstance(output, Mapping) else sorted(_public(output))
        has = f"{type(output).__name__} with {', '.join(map(str, names)) or 'no names'}"
    raise LookupError(
        f"output_index={index!r}: the model returned {has}; write the position or the name of the "
        f"prediction in it"
    )


def _public(output: Any) -> list[str]:
    """Public attributes of an object that is no tensor."""
    return [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]
