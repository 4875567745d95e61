"""Selecting the prediction in a model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def predicted(output: Any, index: int | str) -> Any:
    """Return the prediction in a model's output.

    Args:
        output: a tensor, tuple, list, mapping, or an object with attributes.
        index: position in the output (0 for an output that is one tensor), or name of an item or
            attribute, which may be a path such as `decoder.logits`.

    Raises:
        LookupError: the output has no such position or name.
    """
    is_tensor = hasattr(output, "shape")
    if isinstance(index, int):
        if is_tensor and index == 0:
            return output
        values = list(output.values()) if isinstance(output, Mapping) else output
        try:
            if not is_tensor:
                return values[index]
        except (LookupError, TypeError):
            pass
        count = len(values) if hasattr(values, "__len__") else "no"
        has = "one tensor" if is_tensor else f"{type(output).__name__} of {count} values"
    else:
        if isinstance(output, Mapping) and index in output:
            return output[index]
        if not is_tensor and hasattr(output, index):
            return getattr(output, index)
        if "." in index:
            first, _, rest = index.partition(".")
            return predicted(predicted(output, first), rest)
        attributes = sorted(n for n in getattr(output, "__dict__", {}) if not n.startswith("_"))
        names = list(output) if isinstance(output, Mapping) else attributes
        has = f"{type(output).__name__} with {', '.join(map(str, names)) or 'no names'}"
    raise LookupError(
        f"output_index={index!r}: the model returned {has}; write the position or the name of the "
        f"prediction in it"
    )
