"""Curves of metrics, with few points that show what many do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ditty_di.report.runs import Run

#: Title, unit and metrics of the charts that come first: a name, or a prefix with a `*`.
_FIRST = (
    ("Loss", "", ("loss", "validation/loss")),
    ("Learning rate", "", ("lr", "lr/*")),
    ("Gradient norm", "", ("grad_norm", "grad_norm/*")),
    ("Loss by source", "", ("loss/*", "validation/loss/*")),
    ("Throughput", "tokens/s", ("tokens_per_second",)),
    ("Memory", "GiB", ("memory_gib", "memory_reserved_gib")),
    ("Model FLOPs utilization", "", ("mfu",)),
    ("Time of a step", "s", ("seconds_per_step",)),
    ("Time spent loading data", "share", ("data_loading_share",)),
)
#: Not drawn: they follow from others.
_LEFT_OUT = ("eta_seconds", "tokens_seen", "tflops")
#: Drawn without a smoothed curve.
_SMOOTH_ALREADY = ("lr", "memory", "validation/", "tokens/", "rows/", "epochs/")


def charts(runs: Sequence[Run], points: int) -> list[dict[str, Any]]:
    """Return the charts of runs: `title`, `unit`, `more` (a lesser one) and `series`.

    A series has the position of its `run`, a `label`, `held_out`, and the points `raw` and, where
    there are enough, `smooth`: two lists, steps and values, where None is not finite.

    Args:
        runs: the runs.
        points: how many points of a curve are kept, over all runs of a chart.
    """
    names = sorted({name for run in runs for name in run.series} - {*_LEFT_OUT})
    chosen: list[tuple[str, str, list[str]]] = []
    left = list(names)
    for title, unit, patterns in _FIRST:
        own = [name for name in left if any(_fits(name, pattern) for pattern in patterns)]
        left = [name for name in left if name not in own]
        chosen += [(title, unit, own)] if own else []
    more = len(chosen)
    for group in dict.fromkeys(_group(name) for name in left):
        chosen.append((group, "", [name for name in left if _group(name) == group]))
    if len(runs) > 1:  # one curve a run in each chart: colors tell runs apart
        chosen, more = _split(chosen, more)
    limit = max(points // len(runs), 200)
    return [
        {
            "title": title,
            "unit": unit,
            "more": number >= more,
            "series": [_series(n, run, m, limit) for m in own for n, run in having(runs, m)],
        }
        for number, (title, unit, own) in enumerate(chosen)
    ]


def having(runs: Sequence[Run], metric: str) -> list[tuple[int, Run]]:
    """Return the runs, with their positions, that have logged a metric."""
    return [(n, run) for n, run in enumerate(runs) if metric in run.series]


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))


def _group(name: str) -> str:
    parts = name.removeprefix("validation/").split("/")
    return parts[0].replace("_", " ")


def _split(
    chosen: list[tuple[str, str, list[str]]], more: int
) -> tuple[list[tuple[str, str, list[str]]], int]:
    """Return the charts with one metric each; training and held-out values of one stay together."""
    found, first = [], 0
    for number, (title, unit, names) in enumerate(chosen):
        plain = dict.fromkeys(name.removeprefix("validation/") for name in names)
        for name in plain:
            own = [each for each in names if each.removeprefix("validation/") == name]
            found.append((title if len(plain) == 1 else f"{title}: {_label(name)}", unit, own))
        first = len(found) if number < more else first
    return found, first


def _label(name: str) -> str:
    plain = name.removeprefix("validation/").rpartition("/")[2]
    return plain.removesuffix("_gib").replace("_", " ")


def _series(number: int, run: Run, metric: str, limit: int) -> dict[str, Any]:
    steps, values = run.series[metric]
    held_out = metric.startswith("validation/")
    series: dict[str, Any] = {
        "run": number,
        "label": f"{_label(metric)}{', held out' if held_out else ''}",
        "held_out": held_out,
        "raw": _decimated(steps, values, limit),
    }
    if len(values) >= 20 and not metric.startswith(_SMOOTH_ALREADY):
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), limit // 2)).astype(int))
        smooth = _smoothed(values)
        series["smooth"] = [[steps[i] for i in kept], [_short(smooth[i]) for i in kept]]
    return series


def _decimated(steps: Sequence[int], values: Sequence[float | None], limit: int) -> list[list[Any]]:
    """Return the lowest and the highest point of each of `limit / 2` equal parts of a curve.

    The first, the last and, in each part, the first that is not finite are kept too.
    """
    if len(steps) <= limit:
        return [list(steps), [_short(value) for value in values]]
    array = np.array([math.nan if v is None else v for v in values], dtype=float)
    kept = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), limit // 2):
        own = array[part]
        finite = np.isfinite(own)
        if finite.any():
            kept.add(int(part[np.where(finite, own, np.inf).argmin()]))
            kept.add(int(part[np.where(finite, own, -np.inf).argmax()]))
        if not finite.all():
            kept.add(int(part[finite.argmin()]))
    order = sorted(kept)
    return [[steps[i] for i in order], [_short(values[i]) for i in order]]


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Return the mean of two exponential averages over a fiftieth of the points: past and future.

    It does not lag behind. Values that are not finite are left out of it.
    """
    decay = 1.0 - 1.0 / max(len(values) / 50, 2.0)

    def average(ordered: Iterable[float | None]) -> list[float | None]:
        total = weight = 0.0
        found: list[float | None] = []
        for value in ordered:
            if value is not None and math.isfinite(value):
                total, weight = decay * total + value, decay * weight + 1.0
            found.append(total / weight if weight else None)
        return found

    pairs = zip(average(values), reversed(average(reversed(values))), strict=True)
    return [(a if b is None else b if a is None else (a + b) / 2) for a, b in pairs]


def _short(value: float | None) -> float | None:
    """Return a value with six digits, which is more than a picture shows."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
