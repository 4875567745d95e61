"""The split of documents and records into training and validation, by a hash of the content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def content_hash(text: str | bytes) -> int:
    """Return a hash of a text, or its UTF-8, uniformly distributed over [0, 2**64)."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def threshold(hashes: Iterable[int], fraction: float) -> int:
    """Return the hash below which items are held out for validation.

    It depends on `fraction` alone, so that equal items are on one side and added items move none
    of the others. Only where all of a few items would be on one side it moves to the item nearest
    to it. Items that are all equal are for training.

    Args:
        hashes: Hash of each item; read only as far as needed.
        fraction: Fraction of the items to hold out.
    """
    limit = int(fraction * 2**64)
    lowest, highest = 1 << 64, -1
    for value in hashes:
        lowest, highest = min(lowest, value), max(highest, value)
        if lowest < limit <= highest:
            return limit
    if lowest >= highest:
        return lowest
    return lowest + 1 if lowest >= limit else highest
