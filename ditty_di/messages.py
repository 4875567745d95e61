"""Small helpers for error messages and logs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def first_of(items: Iterable[object], limit: int = 3) -> str:
    """Return the first items joined by commas, and how many more there are.

    Args:
        items: values to name, in the order in which they are shown.
        limit: number of items that are shown.
    """
    names = [str(item) for item in items]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def readable(size: float) -> str:
    """Return a number of bytes for people: `1.2 GB`."""
    units = [(10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")]
    factor, unit = next(((f, u) for f, u in units if size >= f), (1, "bytes"))
    return f"{size / factor:.1f} {unit}" if factor > 1 else f"{size:.0f} bytes"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines whose columns stand below each other.

    Args:
        rows: at least one, all of one length.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it was raised from or while it was handled, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def too_low(least: float, **values: float | None) -> list[str]:
    """Return what is wrong with the values that are below a minimum.

    Args:
        least: the minimum.
        **values: by name; None was not given.
    """
    bound = f"must be at least {least}" if least else "must not be negative"
    given = {name: value for name, value in values.items() if value is not None}
    return [f"{name}={value} {bound}" for name, value in given.items() if value < least]


def refuse(problems: Iterable[str]) -> None:
    """Raise ValueError with all problems, a line for each, if there are any."""
    if text := "\n".join(problems):
        raise ValueError(text)


def closest(word: str, known: Iterable[Any], cutoff: float = 0.6) -> str | None:
    """Return the name most like `word`, or None.

    Args:
        word: the name that does not exist.
        known: the names that do; only texts count.
        cutoff: smallest similarity, from 0 to 1.
    """
    names = [name for name in known if isinstance(name, str)]
    return next(iter(difflib.get_close_matches(word, names, 1, cutoff)), None)


def did_you_mean(word: str, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """Return `; did you mean 'x'?` with the `closest` name, or nothing when none is close."""
    near = closest(word, known, cutoff)
    return "" if near is None else f"; did you mean {near!r}?"
