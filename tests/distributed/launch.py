"""Runs a function of `tests.distributed.cases` in real processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import warm

ROOT = Path(__file__).parents[2]


def launch(case: str, nproc: int, folder: Path, *, timeout: float = 400, **arguments: Any) -> Any:
    """Calls `cases.<case>(folder=..., **arguments)` on `nproc` ranks; rank 0's return value.

    Raises:
        AssertionError: a rank failed; the message has the output of every rank.
    """
    result = folder / f"{case}-{nproc}.json"
    payload = json.dumps({"folder": str(folder), **arguments})
    warm.ranks(["-m", "tests.distributed.cases", case, result, payload], nproc, timeout=timeout)
    return json.loads(result.read_text())
