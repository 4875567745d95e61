"""A sweep as data: the keys that were varied, their positions on axes, and their importance."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ditty_di.report.runs import Run

_BINS = 4
_TICKS = 5


def varied(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return key -> value in each run, of the keys that were typed with different values.

    Args:
        runs: the runs; a value is None where one has no such override.
    """
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    found = {key: [_value(run.overrides.get(key)) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if len({*values}) > 1}


def _value(text: str | None) -> int | float | str | None:
    if text is None:
        return None
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return text.strip("'\"")


def axis(values: Sequence[Any]) -> dict[str, Any]:
    """Return `positions` from 0 to 1 (None where there is no value), and `ticks` (position, label).

    Numbers that span more than a factor of 20 are on a logarithmic axis; text is in order.

    Args:
        values: numbers, or anything with a text.
    """
    known = [value for value in values if value is not None]
    if not all(isinstance(value, int | float) for value in known):
        names = sorted({str(value) for value in known})
        positions = {name: (n + 0.5) / len(names) for n, name in enumerate(names)}
        return {
            "positions": [None if value is None else positions[str(value)] for value in values],
            "ticks": [[at, name] for name, at in positions.items()],
        }
    low, high = min(known), max(known)
    log = low > 0 and high / low > 20
    scaled = [None if v is None else (math.log(v) if log else float(v)) for v in values]
    ends = [math.log(end) if log else float(end) for end in (low, high)]
    width = ends[1] - ends[0] or 1.0
    if len({*known}) <= _TICKS:
        ticks = sorted({*known})
    elif log:
        ticks = [*(10.0**n for n in range(math.ceil(ends[0] / math.log(10)), 99) if 10.0**n < high)]
        ticks = [low, *ticks[:: len(ticks) // _TICKS + 1], high]
    else:
        ticks = [low + (high - low) * n / (_TICKS - 1) for n in range(_TICKS)]
    at = [((math.log(t) if log else t) - ends[0]) / width for t in ticks]
    # A label of a power of ten that is close to that of an end would lie on it.
    shown = [
        [position, f"{tick:.3g}"]
        for n, (position, tick) in enumerate(zip(at, ticks, strict=True))
        if n in (0, len(ticks) - 1) or 0.06 < position < 0.94
    ]
    return {
        "positions": [None if v is None else (v - ends[0]) / width for v in scaled],
        "ticks": shown,
    }


def importance(
    keys: Mapping[str, Sequence[Any]], objectives: Sequence[float]
) -> tuple[dict[str, float], str]:
    """Return the importance of each key for the objective, most important first, and its method.

    Args:
        keys: values of each key.
        objectives: of the same runs.
    """
    found = _by_optuna(keys, objectives) if len(objectives) >= 4 else None
    method = "Optuna's fANOVA: share of the objective's variance that a forest of trees explains"
    if found is None:
        found = {key: _explained(values, objectives) for key, values in keys.items()}
        method = (
            "share of the objective's variance between runs with equal values (numbers in "
            f"{_BINS} groups of equal size), each key by itself"
        )
    order = sorted(found.items(), key=lambda pair: -pair[1])
    return {key: round(float(value), 4) for key, value in order}, method


def _by_optuna(
    keys: Mapping[str, Sequence[Any]], objectives: Sequence[float]
) -> dict[str, float] | None:
    """Return the importances by Optuna, None without it or where it cannot tell."""
    try:
        import optuna
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    except ImportError:
        return None
    kinds: Any = optuna.distributions
    if not hasattr(kinds, "FloatDistribution"):  # Optuna 2
        return None
    spaces: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    for key, values in keys.items():
        if all(isinstance(value, int | float) for value in values):
            low, high = min(values), max(values)
            spaces[key] = kinds.FloatDistribution(low, high, log=low > 0 and high / low > 20)
            columns[key] = [float(value) for value in values]
        else:
            columns[key] = [str(value) for value in values]
            spaces[key] = kinds.CategoricalDistribution(sorted({*columns[key]}))
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        for n, objective in enumerate(objectives):
            params = {key: column[n] for key, column in columns.items()}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=spaces, value=objective)
            )
        return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))
    except (ImportError, RuntimeError, ValueError):  # without scikit-learn; one objective for all
        return None
    finally:
        optuna.logging.set_verbosity(level)


def _explained(values: Sequence[Any], objectives: Sequence[float]) -> float:
    """Return the variance between groups of equal values divided by the whole (eta squared)."""
    y = np.asarray(objectives, dtype=float)
    groups: dict[Any, list[int]] = defaultdict(list)
    numbers = all(isinstance(value, int | float) for value in values)
    if numbers and len({*values}) > _BINS:
        for number, part in enumerate(np.array_split(np.argsort(values, kind="stable"), _BINS)):
            groups[number] = [int(n) for n in part]
    else:
        for n, value in enumerate(values):
            groups[value].append(n)
    whole = float(((y - y.mean()) ** 2).sum())
    between = sum(len(own) * (y[own].mean() - y.mean()) ** 2 for own in groups.values())
    return float(between / whole) if whole else 0.0
