"""Numbers as people read them."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Return a number with the digits that matter: 7.2913, 0.00031, 14,600; "-" without one.

    Args:
        value: the number.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def clock(seconds: float | None) -> str:
    """Return a duration in its two greatest units: 42 s, 3 min 20 s, 5 h 12 min, 2 d 3 h.

    Args:
        seconds: its length.
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for small, low, high, big in ((60, "s", "min", 3600), (3600, "min", "h", 86400)):
        if whole < big:
            rest = whole % small * 60 // small
            return f"{whole // small} {high}" + (f" {rest} {low}" if rest else "")
    days, hours = divmod(whole // 3600, 24)
    return f"{days} d {hours} h"


def size(count: float) -> str:
    """Return a number of bytes in the unit that fits.

    Args:
        count: the bytes.
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
