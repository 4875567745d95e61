"""The loader: the same rows in the same order on any layout, from any position."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ditty_di.data.order import Order
from ditty_di.data.row_seeds import FILLING, SeededRows, draws, preserved_generators, preserving
from ditty_di.launch import parent_death, signals
from ditty_di.protocols import early_checks

if TYPE_CHECKING:
    from ditty_di.protocols import Batch

_STOP_SIGNALS = signals.SIGNALS


NO_PAIR = """\
a micro-batch must be a pair (inputs, labels), not {found}. Let the dataset's rows be pairs \
(x, y), ({{"input": x, ...}}, y) or {{"input": x, "labels": y}}, or pass a `collate_fn`; "input" \
is the model's first argument, and every other entry goes to forward under its own name"""


class Dataset(Protocol):
    """Anything with a length and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class OrderFactory(Protocol):
    """`Order`, or a partial of a subclass of it."""

    def __call__(self, rows: int, seed: int, shuffle: bool, /) -> Order: ...


class Loader:
    """Yields this rank's micro-batches `(inputs, labels)` of a map-style dataset.

    The rows of all epochs form one stream, epoch after epoch without a gap, each shuffled by
    (seed, epoch) alone. A global micro-batch is the stream's next `batch_size * dp_world_size`
    rows, of which rank r takes the r-th `batch_size`: any layout sees the same rows in a window of
    the same size, and every row comes once per epoch over all ranks.

    `epochs=None` never ends. Otherwise the stream ends after `epochs` times the dataset (a
    fraction is allowed, rounded up to a whole row), and the last global micro-batch is filled up
    with rows whose labels are all `ignore_index`, so that every rank yields equally many;
    `drop_last` leaves it out instead. Filling needs labels `[batch, ...]` of integers, or
    a `collate_fn` that fills. Other labels, such as those of a regression, have no value that a
    loss ignores: the rows that are left are spread over the ranks as evenly as possible, and a rank
    for which none is left ends one micro-batch earlier.

    Rows are `(x, y)`, or `({"input": x, ...}, y)`, or `{"input": x, "labels": y, ...}`.
    `collate_fn` makes such a batch of a list of rows; torch's `default_collate` otherwise. One with
    a true attribute `fills` takes None for each row that fills up, and so may give labels of any
    shape. `order` makes the order of rows: None is `Order`; a partial of `LengthGrouped` is
    another.
    Workers ignore SIGTERM and SIGINT, which are the trainer's to answer.
    What a row draws from Python's, NumPy's and torch's global CPU generators follows from the seed
    and its place in the stream, on any layout and with any number of workers; what `collate_fn`
    draws, from the place of the micro-batch's first row (`SeededRows`). The generators of this
    process are not touched. A generator of the dataset's own is not known, and starts anew with a
    resume.

    `state_dict()` counts the rows, over all ranks, of the micro-batches that were yielded: a
    loader with another `batch_size`, `dp_world_size` or `num_workers` takes it and goes on with
    exactly the rows that are left. The `iter()` after `load_state_dict` starts there, every other
    one at the beginning. Only the newest iterator counts.

    Raises `ValueError` for arguments out of range, or an empty dataset; `TypeError` with the first
    micro-batch for rows of another form.
    """

    @staticmethod
    def validate(*, batch_size: int = 1, seed: int = 0, num_workers: int = 0) -> None:
        _require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
        _require(seed >= 0, f"seed={seed} must not be negative")
        _require(num_workers >= 0, f"num_workers={num_workers} must not be negative")

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: float | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        ignore_index: int = -100,
        pin_memory: bool = False,
        drop_last: bool = False,
        order: OrderFactory | None = None,
        dp_rank: int = 0,
        dp_world_size: int = 1,
    ) -> None:
        rows = len(dataset)
        _require(rows > 0, "the dataset has no rows")
        self.validate(batch_size=batch_size, seed=seed, num_workers=num_workers)
        _require(
            0 <= dp_rank < dp_world_size,
            f"dp_rank={dp_rank} must be at least 0 and below dp_world_size={dp_world_size}",
        )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.ignore_index = ignore_index
        self.pin_memory = pin_memory
        self.dp_rank = dp_rank
        self.dp_world_size = dp_world_size
        self._order = (order or Order)(rows, seed, shuffle)
        self._fills = bool(getattr(collate_fn, "fills", False))
        self._step = batch_size * dp_world_size  # rows of a global micro-batch
        self._end = None if epochs is None else _rows_in(epochs, rows)
        if self._end is not None and drop_last:
            _require(
                self._end >= self._step,
                f"drop_last leaves nothing: {self._end} rows make no micro-batch of {self._step}",
            )
        self._drop_last = drop_last
        self._spread = False  # the last micro-batch is spread over the ranks, not filled up
        self._draws: bool | None = None  # whether rows take random numbers; None is not known yet
        self._start = self._consumed = 0  # of the newest iterator; both are places in the stream
        self._resuming = False

    def __len__(self) -> int:
        """Micro-batches from the beginning to the end, those that are filled up included."""
        if self._end is None:
            # A TypeError, as list() asks for the length as a hint and takes this for "unknown".
            raise TypeError("a loader with epochs=None never ends: it has no length")
        return self._end // self._step if self._drop_last else -(-self._end // self._step)

    def __iter__(self) -> Iterator[Batch]:
        self._start = self._consumed = self._consumed if self._resuming else 0
        self._resuming = False
        return self._batches(self._start)

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self._consumed, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `ValueError` when the state belongs to another order of rows."""
        missing = [key for key in self.state_dict() if state_dict.get(key) is None]
        _require(not missing, f"the saved data position lacks {missing}: it has {[*state_dict]}")
        saved = {key: value for key, value in state_dict.items() if key != "consumed"}
        _require(
            saved == self._identity(),
            f"the data position was saved with {_in_words(saved)}, but this loader has "
            f"{_in_words(self._identity())}: its rows come in another order. Give it the same "
            "dataset and seed, or start the data anew (load.data=false).",
        )
        self._start = self._consumed = int(state_dict["consumed"])
        self._resuming = True

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the newest micro-batch (over all ranks) ends in."""
        return max(0, self._consumed - 1) // len(self.dataset)

    def last_rows(self, n: int = 1) -> list[int]:
        """Dataset row numbers of this rank's last `n` yielded micro-batches, oldest first."""
        yielded = -(-(self._consumed - self._start) // self._step)
        places = (self._start + i * self._step for i in range(max(0, yielded - n), yielded))
        return [row for place in places for row in self._rows_at(place)]

    def _identity(self) -> dict[str, Any]:
        return self._order.identity()

    def _places(self, place: int) -> Iterator[int]:
        """Where each global micro-batch begins."""
        while self._end is None or place + (self._step if self._drop_last else 1) <= self._end:
            yield place
            place += self._step

    def _rows_at(self, place: int) -> list[int]:
        """This rank's rows of the global micro-batch at `place`: fewer at the very end."""
        return self._order.between(*self._span(place))

    def _span(self, place: int) -> tuple[int, int]:
        """First and last + 1 of the places of those rows."""
        if self._spread and self._end is not None and place + self._step > self._end:
            left = self._end - place
            # Rounded up, so that the first ranks have the most: rank 0's state is what is saved.
            first, last = (place - -left * (self.dp_rank + n) // self.dp_world_size for n in (0, 1))
            return first, last
        first = place + self.dp_rank * self.batch_size
        last = first + self.batch_size
        return first, last if self._end is None else min(last, self._end)

    def _indices(self, start: int) -> Iterator[list[tuple[int, int]]]:
        """This rank's micro-batches as (place, row), those that fill up included."""
        for place in self._places(start):
            first, rows = self._span(place)[0], self._rows_at(place)
            if not self._spread:
                rows += [FILLING if self._fills else 0] * (self.batch_size - len(rows))
            if rows:
                yield list(enumerate(rows, first))

    def _batches(self, start: int) -> Iterator[Batch]:
        import torch
        from torch.utils.data import DataLoader

        self._spread = self._must_spread(start)
        seeded = self.num_workers > 0 or self._rows_draw()
        loader: DataLoader[Any] = DataLoader(
            SeededRows(self.dataset, self.seed if seeded else None),  # type: ignore[arg-type]
            batch_sampler=self._indices(start),  # type: ignore[arg-type]  # no length: may not end
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            # Its own: from the global generator, resuming would shift dropout.
            generator=torch.Generator(),
            worker_init_fn=partial(_start_worker, parent_death.in_main_thread()),
        )
        with _stop_signals_blocked():
            batches: Iterator[Any] = iter(loader)
        if seeded and not self.num_workers:
            batches = preserving(batches)
        filled = not (self._fills or self._spread)
        for batch, place in zip(batches, self._places(start), strict=not self._spread):
            inputs, labels = _pair(batch)
            if self._end is not None and place + self._step > self._end and filled:
                labels = labels.clone()  # a dataset's own memory, perhaps
                labels[len(self._rows_at(place)) :] = self.ignore_index
            self._consumed = place + self._step
            if self._end is not None:
                self._consumed = min(self._consumed, self._end)
            yield inputs, labels

    def _must_spread(self, start: int) -> bool:
        """Whether the last micro-batch is incomplete and its labels cannot be filled up.

        The first row tells, on all ranks alike; the generators of this process are not touched.
        """
        import torch
        from torch.utils.data import default_collate

        if self._end is None or self._drop_last or self._fills:
            return False
        if (self._end - start) % self._step == 0 or start >= self._end:
            return False
        with preserved_generators():
            row = self.dataset[self._order.between(start, start + 1)[0]]
            _, labels = _pair((self.collate_fn or default_collate)([row]))
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            return True
        if not torch.iinfo(labels.dtype).min <= self.ignore_index:
            return True
        return labels.ndim == 0 or len(labels) != 1

    def _rows_draw(self) -> bool:
        from torch.utils.data import default_collate

        if self._draws is None:
            self._draws = draws(self.dataset, self.collate_fn or default_collate)
        return self._draws


def _validate_horizon(*, steps: Any = ..., epochs: Any = ..., global_batch_size: Any = ...) -> None:
    """Raise ValueError for what is known to be wrong; `...` is not known."""
    if ... not in (steps, epochs) and (steps is None) == (epochs is None):
        given = "neither is" if steps is None else f"steps={steps} and epochs={epochs} are"
        raise ValueError(f"give exactly one of steps and epochs ({given} given; null unsets one)")
    if isinstance(steps, int):
        _require(steps >= 1, f"steps={steps} must be at least 1")
    if isinstance(epochs, int | float):
        _require(math.isfinite(epochs) and epochs > 0, f"epochs={epochs} must be above 0")
        if global_batch_size is None:
            raise ValueError(f"epochs={epochs} need a global_batch_size to be counted in steps")
    if isinstance(global_batch_size, int):
        _require(
            global_batch_size >= 1, f"global_batch_size={global_batch_size} must be at least 1"
        )


@early_checks(validate=_validate_horizon)
def horizon(
    *,
    steps: int | None = None,
    epochs: float | None = None,
    dataset: Dataset,
    global_batch_size: int | None = None,
) -> int:
    """The number of optimizer steps: `steps`, or as many as `epochs` of the dataset need.

    `global_batch_size` in rows a step, over accumulation and data-parallel ranks.

    Raises `ValueError` unless exactly one of `steps` and `epochs` is given.
    """
    _validate_horizon(steps=steps, epochs=epochs, global_batch_size=global_batch_size)
    if steps is not None:
        return steps
    assert epochs is not None and global_batch_size is not None
    _require(len(dataset) > 0, "the dataset has no rows")
    return -(-_rows_in(epochs, len(dataset)) // global_batch_size)


def _rows_in(epochs: float, rows: int) -> int:
    """Exact: 0.1 epochs of 30 rows are 3 rows, although `0.1 * 30 > 3`."""
    _require(math.isfinite(epochs) and epochs > 0, f"epochs={epochs} must be above 0")
    return math.ceil(Fraction(str(epochs)) * rows)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _pair(batch: Any) -> Batch:
    """`(inputs, labels)` of what a collation gave; labels of none are int64 `[rows, 0]`."""
    import torch

    labels: Any = None
    if isinstance(batch, Mapping):
        batch = dict(batch)
        labels = batch.pop("labels", None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        batch, labels = batch
    else:
        raise TypeError(NO_PAIR.format(found=f"a {type(batch).__name__}"))
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input": batch}
    if inputs and not isinstance(inputs.get("input"), torch.Tensor):
        found = f"inputs of type {type(batch).__name__}"
        if isinstance(batch, Mapping):
            found = f"a mapping with {', '.join(map(str, batch))} and no tensor 'input'"
        raise TypeError(NO_PAIR.format(found=found))
    if labels is None and inputs:
        labels = torch.empty(len(inputs["input"]), 0, dtype=torch.int64)
    if not isinstance(labels, torch.Tensor):
        raise TypeError(NO_PAIR.format(found=f"labels of type {type(labels).__name__}"))
    return inputs, labels


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Workers are born with the mask, so none is hit before it can ignore the signals.

    Not with a fork server: the mask would stay with the server, and so with all its children.
    """
    if multiprocessing.get_start_method() == "forkserver":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(of_main: bool, worker: int) -> None:
    if of_main:  # a thread that ends before the process would take the worker along
        parent_death.die_with_parent_thread()

    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
