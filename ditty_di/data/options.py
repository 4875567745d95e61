"""Checks of options; each raises `ValueError` with the option's name and value."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex, TypeVar

_T = TypeVar("_T")


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` with `message` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def called_with(arguments: Mapping[str, Any], function: Callable[..., _T]) -> _T:
    """Call a function with those of the arguments that it takes, such as the caller's `locals()`.

    So a constructor gives `validate` its own arguments, as long as it has no other variables.
    """
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in taken})


def at_least(minimum: float, **options: float | None) -> None:
    """Require each option to be None or at least `minimum`."""
    bound = f"must be at least {minimum}" if minimum else "must not be negative"
    for name, value in options.items():
        require(value is None or value >= minimum, f"{name}={value} {bound}")


def one_of(known: Iterable[str], **options: Any) -> None:
    """Require each option to be one of the known names."""
    for name, value in options.items():
        require(value in known, f"{name}={value!r} must be one of {', '.join(known)}")


def fraction(**options: float | None) -> None:
    """Require each option to be None or in the interval [0, 1)."""
    for name, value in options.items():
        require(value is None or 0 <= value < 1, f"{name}={value} must be at least 0 and below 1")


def without_ratios(dataset: Any, what: str) -> None:
    """Refuse a mixture with ratios, which an order of its own would ignore."""
    require(
        not getattr(dataset, "stages", None),
        f"{what} take each row of a mixture once, whatever its ratios: leave the ratios out, or "
        "mix one such dataset for each source",
    )


def row_index(index: SupportsIndex, rows: int) -> int:
    """Return the index of a row, counted from the end if it is negative.

    Raises:
        IndexError: There is no such row.
    """
    row = operator.index(index)
    if not -rows <= row < rows:
        raise IndexError(f"row {row} of {rows}")
    return row % rows


def encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8; text with a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(text: str, what: str) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        ValueError: It has a lone surrogate.
    """
    require(encodable(text), f"{what} holds half of a surrogate pair, which is not text")
    return text
