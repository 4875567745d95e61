"""The data loader: the same rows in the same order on any layout, from any position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate

from ditty_di.data import options
from ditty_di.data.sampling.pooled import require_pools
from ditty_di.data.sampling.row_seeds import PADDING, SeededRows, draws, preserving
from ditty_di.data.sampling.sampler import Sampler
from ditty_di.data.workers import start_worker, stop_signals_blocked
from ditty_di.launch import parent_death
from ditty_di.protocols import LoadedBatch, early_checks
from ditty_di.seed import preserved_rng

_NO_PAIR = """\
a micro-batch must be a pair (inputs, labels), not {found}. Let the dataset's rows be pairs \
(x, y), ({{"input": x, ...}}, y) or {{"input": x, "labels": y}}, or pass a `collate_fn`; "input" \
is the model's first argument, and every other entry goes to forward under its own name"""


class Dataset(Protocol):
    """A map-style dataset: a length, and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SamplerFactory(Protocol):
    """`Sampler`, or a partial of a subclass of it."""

    def __call__(self, rows: int, seed: int, shuffle: bool, /) -> Sampler:
        """Return the order of a dataset's rows."""
        ...


class ResumableLoader:
    """Base of the data loaders: what they say of their dataset and of their position."""

    dataset: Any

    @staticmethod
    def validate(
        *,
        micro_batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        epochs: float | None = None,
    ) -> None:
        """Raise `ValueError` for an option out of range."""
        options.at_least(1, micro_batch_size=micro_batch_size)
        options.at_least(0, seed=seed, num_workers=num_workers)
        options.require(epochs is None or epochs > 0, f"epochs={epochs} must be above 0")

    @property
    def source_names(self) -> list[str]:
        """The sources that micro-batches tell apart by their input `source`, by its number."""
        return list(getattr(self.dataset, "source_names", ()))

    @staticmethod
    def _require_order(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless a position was saved in the order that this loader has."""
        if saved != here:
            was, now = (", ".join(f"{k}={v}" for k, v in of.items()) for of in (saved, here))
            raise ValueError(
                f"the data position was saved with {was}, but this loader has {now}: its rows come "
                "in another order. Give it the same dataset and seed, or start the data anew "
                "(load.data=false)."
            )


class Loader(ResumableLoader):
    """A data loader that yields this rank's micro-batches `(inputs, labels)`.

    The rows of all epochs form one stream, each epoch in the order of (seed, epoch) alone. A global
    micro-batch is the stream's next `micro_batch_size * dp_world_size` rows, of which rank r takes
    the r-th `micro_batch_size`. So every row comes once per epoch over all ranks, and any layout
    sees the same rows in an optimizer step of the same size.

    Rows are `(x, y)`, or `({"input": x, ...}, y)`, or `{"input": x, "labels": y, ...}`.

    The last global micro-batch is padded with rows whose labels are all `ignore_index`, so that
    every rank yields equally many. That needs labels `[batch, ...]` of integers, or a `collate_fn`
    with a true attribute `pads_rows`, which receives None for each row of padding. Other labels,
    such as those of a regression, have no value that a loss ignores: the remaining rows are spread
    over the ranks as evenly as possible, and a rank without any ends one micro-batch earlier.

    The random numbers that a row draws from Python's, NumPy's and torch's global CPU generators
    follow from the seed and its position in the stream, those of `collate_fn` from the position of
    the micro-batch's first row (`SeededRows`): any layout and number of workers gives the same. The
    generators of this process are preserved. A generator of the dataset's own is not known, and
    restarts on resume. Workers ignore SIGTERM and SIGINT, which the trainer handles.

    `state_dict()` counts the rows, over all ranks, of the micro-batches that were yielded. A loader
    with another `micro_batch_size`, `dp_world_size` or `num_workers` can load it, and yields
    exactly the remaining rows. Only the first `iter()` after `load_state_dict` starts there. Only
    the newest iterator counts.

    Args:
        dataset: A map-style dataset.
        micro_batch_size: Rows a micro-batch, per rank.
        seed: Seed of the order and of the rows' random numbers.
        shuffle: Shuffle each epoch.
        epochs: Number of epochs, rounded up to a whole row; None never ends.
        num_workers: Number of worker processes; 0 reads in this process.
        collate_fn: Makes a micro-batch of a list of rows; None: torch's `default_collate`.
        ignore_index: Label of padding, excluded from the loss.
        pin_memory: Copy batches to pinned memory.
        drop_last: Leave an incomplete last global micro-batch out.
        sampler: The sampler, such as a partial of `LengthGroupedSampler`. None: what the dataset's
            attribute `sampler` is (`KeyedSampler` for large shards, `PooledSampler` for remote
            ones, `MixtureSampler` for mixtures), else `Sampler`.
        dp_rank: This data-parallel rank.
        dp_world_size: Number of data-parallel ranks.

    Raises:
        ValueError: An argument out of range, an empty dataset, or a sampler that would fetch
            remote shards over and over.
        TypeError: Rows of another form, with the first micro-batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: float | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], LoadedBatch] | None = None,
        ignore_index: int = -100,
        pin_memory: bool = False,
        drop_last: bool = False,
        sampler: SamplerFactory | None = None,
        dp_rank: int = 0,
        dp_world_size: int = 1,
    ) -> None:
        rows = len(dataset)
        options.require(rows > 0, "the dataset has no rows")
        self.validate(micro_batch_size=micro_batch_size, seed=seed, num_workers=num_workers)
        text = f"dp_rank={dp_rank} must be at least 0 and below dp_world_size={dp_world_size}"
        options.require(0 <= dp_rank < dp_world_size, text)
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
        self.batch_size, self.dp_rank, self.dp_world_size = micro_batch_size, dp_rank, dp_world_size
        self.collate_fn, self.ignore_index = collate_fn, ignore_index
        self.num_workers, self.pin_memory = num_workers, pin_memory
        chosen = sampler or getattr(dataset, "sampler", None) or Sampler
        self.sampler = chosen(rows, seed, shuffle)
        require_pools(dataset, self.sampler)
        self._collate = collate_fn or default_collate
        self._pads = bool(getattr(collate_fn, "pads_rows", False))
        self._step = micro_batch_size * dp_world_size  # rows of a global micro-batch
        #: Whether the loader repeats its data without an end.
        self.endless = epochs is None
        self._end = math.inf if epochs is None else _rows_in(epochs, rows)
        text = f"drop_last leaves nothing: {self._end} rows make no micro-batch of {self._step}"
        options.require(not drop_last or self._end >= self._step, text)
        self._drop_last = drop_last
        self._spread = False  # the last micro-batch is spread over the ranks, not padded
        self._start = self._consumed = 0  # positions of the newest iterator in the stream
        self._resuming = False

    def __len__(self) -> int:
        """Return the number of micro-batches from the beginning, padded ones included."""
        if self.endless:
            # A TypeError: list() asks for the length as a hint and takes this for "unknown".
            raise TypeError("a loader with epochs=None never ends: it has no length")
        return int(self._end // self._step if self._drop_last else -(-self._end // self._step))

    def __iter__(self) -> Iterator[LoadedBatch]:
        self._start = self._consumed = self._consumed if self._resuming else 0
        self._resuming = False
        return self._batches(self._start)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and everything that determines its order."""
        return {"consumed": self._consumed, **self.sampler.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: The position is one in another order of rows.
        """
        missing = [key for key in self.state_dict() if state_dict.get(key) is None]
        text = f"the saved data position lacks {missing}: it has {[*state_dict]}"
        options.require(not missing, text)
        saved = {key: value for key, value in state_dict.items() if key != "consumed"}
        self._require_order(saved, self.sampler.identity())
        self._start = self._consumed = int(state_dict["consumed"])
        self._resuming = True

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last row of the newest micro-batch (over all ranks)."""
        return max(0, self._consumed - 1) // len(self.dataset)

    def get_metrics(self) -> dict[str, float]:
        """Return what the dataset reports about the rows so far, such as the epochs of sources."""
        report = getattr(self.dataset, "get_metrics", None)
        return report(self.sampler, self._consumed) if report is not None else {}

    def last_rows(self, n: int = 1) -> list[int]:
        """Return the row numbers of this rank's last `n` micro-batches, oldest first."""
        yielded = -(-(self._consumed - self._start) // self._step)
        starts = (self._start + i * self._step for i in range(max(0, yielded - n), yielded))
        return [row for start in starts for row in self.sampler.between(*self._span(start))]

    def _starts(self, start: int) -> Iterator[int]:
        """Yield the position at which each global micro-batch begins."""
        while start + (self._step if self._drop_last else 1) <= self._end:
            yield start
            start += self._step

    def _span(self, start: int) -> tuple[int, int]:
        """Return the positions of this rank's rows of a global micro-batch: first and last + 1."""
        if self._spread and start + self._step > self._end:
            left = int(self._end) - start
            # Rounded up, so that the first ranks have the most: rank 0's state is saved.
            first, last = (start - -left * (self.dp_rank + n) // self.dp_world_size for n in (0, 1))
            return first, last
        first = start + self.dp_rank * self.batch_size
        return first, int(min(first + self.batch_size, self._end))

    def _indices(self, start: int) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's micro-batches as pairs (position, row), padding included."""
        for at in self._starts(start):
            first, last = self._span(at)
            rows = self.sampler.between(first, last)
            if not self._spread:
                rows += [PADDING if self._pads else 0] * (self.batch_size - len(rows))
            if rows:
                yield list(enumerate(rows, first))

    def _batches(self, start: int) -> Iterator[LoadedBatch]:
        self._spread = self._must_spread(start)
        seeded = self.num_workers > 0 or self._draws
        loader: DataLoader[Any] = DataLoader(
            SeededRows(self.dataset, self.seed if seeded else None),  # type: ignore[arg-type]
            batch_sampler=self._indices(start),  # type: ignore[arg-type]  # no length: may not end
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            # Its own: with the global generator, resuming would change dropout.
            generator=torch.Generator(),
            worker_init_fn=partial(start_worker, parent_death.in_main_thread()),
        )
        with stop_signals_blocked():
            batches: Iterator[Any] = iter(loader)
        if seeded and not self.num_workers:
            batches = preserving(batches)
        for batch, at in zip(batches, self._starts(start), strict=not self._spread):
            inputs, labels = as_pair(batch)
            if at + self._step > self._end and not (self._pads or self._spread):
                first, last = self._span(at)
                labels = labels.clone()  # it may be a dataset's own memory
                labels[max(0, last - first) :] = self.ignore_index
            self._consumed = int(min(at + self._step, self._end))
            yield inputs, labels

    def _must_spread(self, start: int) -> bool:
        """Return whether the last micro-batch is incomplete and its labels cannot be padded.

        The first row decides, the same on all ranks.
        """
        ends_even = self.endless or (self._end - start) % self._step == 0
        if ends_even or start >= self._end or self._drop_last or self._pads:
            return False
        with preserved_rng():
            row = self.dataset[self.sampler.between(start, start + 1)[0]]
            _, labels = as_pair(self._collate([row]))
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            return True
        too_small = self.ignore_index < torch.iinfo(labels.dtype).min
        return too_small or labels.ndim == 0 or len(labels) != 1

    @cached_property
    def _draws(self) -> bool:
        return draws(self.dataset, self._collate)


def _validate_steps(
    *, max_steps: Any = ..., epochs: Any = ..., global_batch_size: Any = ...
) -> None:
    """Raise ValueError for arguments that are known to be wrong; `...` is not known."""
    if ... not in (max_steps, epochs) and (max_steps is None) == (epochs is None):
        given = (
            "neither is" if max_steps is None else f"max_steps={max_steps} and epochs={epochs} are"
        )
        raise ValueError(
            f"give exactly one of max_steps and epochs ({given} given; null unsets one)"
        )
    if isinstance(max_steps, int):
        options.at_least(1, max_steps=max_steps)
    if isinstance(epochs, int | float):
        _check_epochs(epochs)
        text = f"epochs={epochs} need a global_batch_size to be counted in steps"
        options.require(global_batch_size is not None, text)
    if isinstance(global_batch_size, int):
        options.at_least(1, global_batch_size=global_batch_size)


@early_checks(validate=_validate_steps)
def training_steps(
    *,
    max_steps: int | None = None,
    epochs: float | None = None,
    dataset: Dataset,
    global_batch_size: int | None = None,
) -> int:
    """Return the number of optimizer steps, given as such or in epochs.

    Args:
        max_steps: Number of optimizer steps.
        epochs: Number of epochs, instead of `max_steps`.
        dataset: The dataset of the epochs.
        global_batch_size: Rows an optimizer step, over accumulation and data-parallel ranks.

    Raises:
        ValueError: Not exactly one of `max_steps` and `epochs` is given.
    """
    _validate_steps(max_steps=max_steps, epochs=epochs, global_batch_size=global_batch_size)
    if epochs is None or global_batch_size is None:
        assert max_steps is not None
        return max_steps
    options.require(len(dataset) > 0, "the dataset has no rows")
    return -(-_rows_in(epochs, len(dataset)) // global_batch_size)


def _check_epochs(epochs: float) -> None:
    options.require(math.isfinite(epochs) and epochs > 0, f"epochs={epochs} must be above 0")


def _rows_in(epochs: float, rows: int) -> int:
    """Return the rows of some epochs, exactly: 0.1 epochs of 30 are 3, although 0.1 * 30 > 3."""
    _check_epochs(epochs)
    return math.ceil(Fraction(str(epochs)) * rows)


def as_pair(batch: Any) -> LoadedBatch:
    """Return `(inputs, labels)` of a collated batch; without labels they are int64 `[rows, 0]`."""
    labels: Any = None
    if isinstance(batch, Mapping):
        batch = dict(batch)
        labels = batch.pop("labels", None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        batch, labels = batch
    else:
        raise TypeError(_NO_PAIR.format(found=f"a {type(batch).__name__}"))
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input": batch}
    if inputs and not isinstance(inputs.get("input"), torch.Tensor):
        found = f"inputs of type {type(batch).__name__}"
        if isinstance(batch, Mapping):
            found = f"a mapping with {', '.join(map(str, batch))} and no tensor 'input'"
        raise TypeError(_NO_PAIR.format(found=found))
    if labels is None and inputs:
        labels = torch.empty(len(inputs["input"]), 0, dtype=torch.int64)
    if not isinstance(labels, torch.Tensor):
        raise TypeError(_NO_PAIR.format(found=f"labels of type {type(labels).__name__}"))
    return inputs, labels
