"""Checks of options; each raises `ValueError` with the option's name and value."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

from ditty_di.messages import refuse, too_low


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` with `message` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def at_least(minimum: float, **options: float | None) -> None:
    """Require each option to be None or at least `minimum`."""
    refuse(too_low(minimum, **options))


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
