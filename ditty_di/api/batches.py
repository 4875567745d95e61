"""Make of any dataset or loader what the trainer's `dataloader` slot takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler, default_collate

from ditty_di.data import Loader
from ditty_di.protocols import DataLoader, DataLoaderFactory, LoadedBatch

NO_BATCH = """\
collate_fn: it returned {found}; return one of
  (inputs, labels)            inputs a tensor, or {{"input": tensor, ...}}
  {{"input": ..., "labels": ...}}   every other entry is an argument of the model's forward
  a tensor                    without labels: a processor writes ctx["target"]"""

NO_LABELS = """\
collate_fn: its labels are a {found}, not a tensor; return everything beside the labels as entries \
of the inputs, {{"input": ..., "other": ...}}, where a preprocessor can read it"""


@dataclass(frozen=True)
class Pairs:
    """Return the result of a collation, which may have several forms, as `(inputs, labels)`.

    A batch without labels gets empty ones, int64 `[rows, 0]`, which no loss takes for a target.
    A call raises TypeError for a result of another form. It is an object and not a closure, so that
    it can be pickled for workers.

    Args:
        collate_fn: makes a batch of a list of rows.
    """

    collate_fn: Callable[[list[Any]], Any]

    @property
    def contract(self) -> Any:
        """The contract of the collation."""
        return getattr(self.collate_fn, "contract", None)

    @property
    def pads_rows(self) -> bool:
        """Whether the collation takes None for a padding row."""
        return bool(getattr(self.collate_fn, "pads_rows", False))

    def __call__(self, rows: list[Any]) -> LoadedBatch:
        """Collate rows.

        Args:
            rows: of one micro-batch.

        Raises:
            TypeError: a result of another form.
        """
        batch, labels = self.collate_fn(rows), None
        if isinstance(batch, Mapping):
            batch = dict(batch)
            labels = batch.pop("labels", None)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            batch, labels = batch
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input": batch}
        if not hasattr(inputs.get("input"), "shape"):
            found = type(batch).__name__
            if isinstance(batch, Mapping):
                found = f"a mapping with {', '.join(map(str, batch))} and no tensor 'input'"
            raise TypeError(NO_BATCH.format(found=found))
        if labels is None:
            labels = torch.empty(len(inputs["input"]), 0, dtype=torch.int64)
        if not hasattr(labels, "shape"):
            raise TypeError(NO_LABELS.format(found=type(labels).__name__))
        return inputs, labels


def dataloader(
    dataset: Any,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    seed: int,
    shuffle: bool,
    num_workers: int,
) -> DataLoaderFactory | DataLoader:
    """Return what fits the trainer's slot.

    Args:
        dataset: one of
            a map-style dataset (a list, a `datasets.Dataset`, torch's `Dataset`), which gets a
            `ditty_di.data.Loader`;
            torch's `DataLoader` over one, which is replaced by a `Loader` with its dataset, batch
            size, collation, workers and shuffling, because ranks cannot share, nor a run resume,
            its own order;
            what makes a loader of `dp_rank` and `dp_world_size`, as `Data.prepare` returns, or any
            other loader with a `batch_size`, which is returned as it is.
        batch_size: rows per micro-batch and rank.
        collate_fn: makes a batch of a list of rows; None is torch's `default_collate`.
        seed: of the order of rows.
        shuffle: a new order for each epoch.
        num_workers: processes that load data.

    Raises:
        TypeError: none of these; a torch loader with a sampler of its own; a `collate_fn` for a
            loader.
    """
    if collate_fn is not None and (callable(dataset) or not _is_map_style(dataset)):
        raise TypeError("collate_fn: the dataset is a loader, which collates by itself")
    if callable(dataset):
        return dataset  # type: ignore[no-any-return]
    pin_memory = False
    if hasattr(dataset, "batch_sampler"):
        _require_shareable(dataset)
        shuffle, num_workers = type(dataset.sampler) is RandomSampler, dataset.num_workers
        batch_size, collate_fn = dataset.batch_size, dataset.collate_fn
        dataset, pin_memory = dataset.dataset, dataset.pin_memory
    if _is_map_style(dataset):
        return partial(
            Loader,
            dataset,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
            collate_fn=Pairs(collate_fn or default_collate),
            pin_memory=pin_memory,
        )
    if hasattr(dataset, "batch_size") and hasattr(dataset, "__iter__"):
        return dataset  # type: ignore[no-any-return]
    raise TypeError(
        f"dataset: a {type(dataset).__name__} is not a map-style dataset (with a length and [i]), "
        f"so its order could not be resumed; for a stream pass partial(StreamLoader, "
        f"Streamed(dataset), micro_batch_size=...) of ditty_di.data"
    )


def _is_map_style(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _require_shareable(loader: Any) -> None:
    """Raise TypeError for a torch loader whose order ranks cannot share, nor a run resume."""
    own = {
        "batch_sampler": loader.batch_size is None,
        "sampler": type(loader.sampler) not in (RandomSampler, SequentialSampler),
        "worker_init_fn": loader.worker_init_fn is not None,
        "an iterable dataset": not _is_map_style(loader.dataset),
    }
    if any(own.values()):
        raise TypeError(
            f"dataset: this DataLoader has {' and '.join(filter(own.get, own))}, which ranks and "
            f"resumed runs cannot share; pass its dataset with collate_fn and "
            f"batch_size, or a loader with state_dict and load_state_dict"
        )
