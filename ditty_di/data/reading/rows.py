"""A user's map-style dataset, and the part of its rows that is held out for validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ditty_di.data import options
from ditty_di.data.content import fingerprint_with
from ditty_di.data.loader import Dataset
from ditty_di.data.sampling.sampler import permutation
from ditty_di.protocols import early_checks

_FORMS = '(x, y), ({"input": x, ...}, y) or {"input": x, "labels": y}'


class Rows:
    """A subset of a dataset's rows.

    Args:
        rows: The dataset.
        indices: Row numbers, in the order of the subset.
    """

    def __init__(self, rows: Dataset, indices: Any) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.rows[int(self.indices[index])]

    def fingerprint(self) -> str | None:
        """Return a digest of the dataset and the indices; None if the dataset has none."""
        return fingerprint_with(self.rows, np.asarray(self.indices, np.int64).tobytes())


def _validate(*, validation_fraction: float | None = None, seed: int | None = None) -> None:
    options.fraction(validation_fraction=validation_fraction)
    options.at_least(0, seed=seed)


def _rehearse(build: Callable[[str], Any]) -> list[str]:
    _check(build("rows"))
    return []


@early_checks(validate=_validate, rehearse=_rehearse)
def training_rows(
    rows: Dataset,
    *,
    validation: Dataset | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Return the rows to train on: all if there is a `validation` dataset, else the rest.

    Args:
        rows: The dataset.
        validation: Another dataset to validate on.
        validation_fraction: Fraction of the rows, at least one, that is held out otherwise.
        seed: Seed of the choice of the rows that are held out.

    Raises:
        ValueError: Not a map-style dataset, rows of another form, or too few to hold one out.
    """
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

    Args:
        rows: See `training_rows`.
        validation: See `training_rows`.
        validation_fraction: See `training_rows`.
        seed: See `training_rows`.

    Raises:
        ValueError: As `training_rows`, or no row is held out.
    """
    held_out = _split(rows, validation, validation_fraction, seed)[1]
    if held_out is None:
        raise ValueError(
            "validation_fraction=0 holds out no rows: give data.validation, a fraction above 0, or "
            "validator=none"
        )
    return held_out


def _split(
    rows: Any, validation: Dataset | None, fraction: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    _validate(validation_fraction=fraction, seed=seed)
    _check(rows)
    if validation is not None:
        _check(validation)
    if validation is not None or fraction == 0:
        return rows, validation
    number = len(rows)
    held_out = max(1, round(number * fraction))
    options.require(
        held_out < number,
        f"rows: {number} are too few to hold one out for validation; give data.validation",
    )
    order = permutation(seed, 0, number)
    return Rows(rows, sorted(order[held_out:])), Rows(rows, sorted(order[:held_out]))


def _check(rows: Any) -> None:
    """Raise `ValueError` unless `rows` is a map-style dataset whose first row has a known form."""
    by_number = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    options.require(
        by_number and not isinstance(rows, Mapping),
        f"rows: a {type(rows).__name__} has no rows by number; give a list, a torch Dataset, or "
        f"anything with a length and [i], whose rows are {_FORMS}",
    )
    options.require(len(rows) > 0, "rows: there is not one row")
    row = rows[0]
    if isinstance(row, tuple | list) and len(row) == 2:
        row = row[0] if isinstance(row[0], Mapping) else {"input": row[0]}
    found = f"a {type(row).__name__}"
    if isinstance(row, Mapping):
        found = f"a mapping with {', '.join(map(str, row))}"
    has_input = isinstance(row, Mapping) and "input" in row
    options.require(has_input, f"rows: row 0 is {found}; rows are {_FORMS}")
