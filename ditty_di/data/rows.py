"""Rows of a user's dataset, and the part of them that is held out for validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ditty_di.data.content import fingerprint_with
from ditty_di.data.loader import Dataset
from ditty_di.data.order import permutation
from ditty_di.protocols import early_checks

NO_ROWS = """\
rows: a {found} has no rows by number; give a list, a torch Dataset, or anything with a length and \
[i], whose rows are (x, y), ({{"input": x, ...}}, y) or {{"input": x, "labels": y}}"""
NO_ROW = """\
rows: row 0 is {found}; rows are (x, y), ({{"input": x, ...}}, y) or {{"input": x, "labels": y}}"""
NONE_HELD_OUT = """\
validation_fraction=0 holds out no rows: give data.validation, a fraction above 0, or \
validator=none"""


class Rows:
    """The rows of a data set at `indices`, in that order."""

    def __init__(self, rows: Dataset, indices: Any) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.rows[int(self.indices[index])]

    def fingerprint(self) -> str | None:
        """Of the data set and the choice of its rows; None if the data set has none."""
        return fingerprint_with(self.rows, np.asarray(self.indices, np.int64).tobytes())


def _validate(*, validation_fraction: float | None = None, seed: int | None = None) -> None:
    if validation_fraction is not None and not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} must be at least 0 and below 1"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"seed={seed} must not be negative")


def _rehearse(build: Callable[[str], Any]) -> list[str]:
    """Look at the first row."""
    _split(build("rows"), None, 0.0, 0)
    return []


@early_checks(validate=_validate, rehearse=_rehearse)
def training_rows(
    rows: Dataset,
    *,
    validation: Dataset | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Return the rows to train on: all of them with a `validation` of its own, else the rest.

    `validation_fraction` of the rows, at least one, is held out; which ones is drawn by `seed`.

    Raises:
        ValueError: no rows by number, rows of another form, or too few to hold one out.
    """
    _validate(validation_fraction=validation_fraction, seed=seed)
    return _split(rows, validation, validation_fraction, seed)[0]


@early_checks(validate=_validate)
def held_out_rows(
    rows: Dataset,
    *,
    validation: Dataset | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Return the rows to validate on: `validation`, or those that `training_rows` leaves out.

    Raises:
        ValueError: as `training_rows`, or no row is held out.
    """
    _validate(validation_fraction=validation_fraction, seed=seed)
    held_out = _split(rows, validation, validation_fraction, seed)[1]
    if held_out is None:
        raise ValueError(NONE_HELD_OUT)
    return held_out


def _split(
    rows: Any, validation: Dataset | None, fraction: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    _check_rows(rows)
    if validation is not None or fraction == 0:
        if validation is not None:
            _check_rows(validation)
        return rows, validation
    number = len(rows)
    held_out = max(1, round(number * fraction))
    if held_out >= number:
        raise ValueError(
            f"rows: {number} are too few to hold one out for validation; give data.validation"
        )
    order = permutation(seed, 0, number)
    return Rows(rows, sorted(order[held_out:])), Rows(rows, sorted(order[:held_out]))


def _check_rows(rows: Any) -> None:
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(NO_ROWS.format(found=type(rows).__name__))
    if isinstance(rows, Mapping):
        raise ValueError(NO_ROWS.format(found=type(rows).__name__))
    if not len(rows):
        raise ValueError("rows: there is not one row")
    row = rows[0]
    if isinstance(row, tuple | list) and len(row) == 2:
        row = row[0] if isinstance(row[0], Mapping) else {"input": row[0]}
    if not isinstance(row, Mapping):
        raise ValueError(NO_ROW.format(found=f"a {type(row).__name__}"))
    if "input" not in row:
        raise ValueError(NO_ROW.format(found=f"a mapping with {', '.join(map(str, row))}"))
