"""Small helpers for error messages and logs."""

from __future__ import annotations

from collections.abc import Iterable


def first_of(items: Iterable[object], limit: int = 3) -> str:
    """Return the first items joined by commas, and how many more there are.

    Args:
        items: values to name, in the order in which they are shown.
        limit: number of items that are shown.
    """
    names = [str(item) for item in items]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
