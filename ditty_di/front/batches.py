"""From what people call a dataset, or a loader, to what the trainer's `dataloader` slot takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ditty_di.data import Loader

if TYPE_CHECKING:
    from ditty_di.protocols import DataLoader, DataLoaderFactory, LoadedBatch

NO_BATCH = """\
collate_fn: it returned {found}, which the trainer cannot take apart; return one of
  (inputs, labels)            inputs a tensor, or {{"input": tensor, ...}}
  {{"input": ..., "labels": ...}}   every other entry is an argument of the model's forward
  a tensor                    without labels: a processor writes ctx["target"]"""

NO_LABELS = """\
collate_fn: its labels are a {found} and no tensor; give what there is beside the labels as \
entries of the inputs, {{"input": ..., "other": ...}}, from where a preprocessor can take it"""


@dataclass(frozen=True)
class Pairs:
    """A collation whose result may have several forms, as `(inputs, labels)`.

    A batch without labels gets empty ones, int64 `[rows, 0]`, which no loss takes for a target.
    An object and not a closure, so that workers can take it by pickle.

    Raises, when called:
        TypeError: a result of another form.
    """

    collate_fn: Callable[[list[Any]], Any]

    @property
    def contract(self) -> Any:
        return getattr(self.collate_fn, "contract", None)

    @property
    def fills(self) -> bool:
        return bool(getattr(self.collate_fn, "fills", False))

    def __call__(self, rows: list[Any]) -> LoadedBatch:
        import torch

        batch = self.collate_fn(rows)
        labels: Any = None
        if isinstance(batch, Mapping):
            batch = dict(batch)
            labels = batch.pop("labels", None)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            batch, labels = batch
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input": batch}
        if "input" not in inputs or not hasattr(inputs["input"], "shape"):
            found = type(batch).__name__
            if isinstance(batch, Mapping):
                found = f"a mapping with {', '.join(map(str, batch))} and no tensor 'input'"
            raise TypeError(NO_BATCH.format(found=found))
        if labels is not None and not hasattr(labels, "shape"):
            raise TypeError(NO_LABELS.format(found=type(labels).__name__))
        if labels is None:
            labels = torch.empty(len(inputs["input"]), 0, dtype=torch.int64)
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
    """Fits the trainer's slot, for any of these:

    * rows by number (a list, a `datasets.Dataset`, torch's `Dataset`): `ditty_di.data.Loader`;
    * torch's `DataLoader` over such rows: the same, with its dataset, batch size, collation,
      workers and whether it shuffles, for its own order could neither be shared by ranks nor
      resumed;
    * what makes a loader of `dp_rank` and `dp_world_size`, as `Data.prepare` does, or any other
      loader with a `batch_size`: itself.

    Raises:
        TypeError: none of these; a torch loader with a sampler of its own; arguments that a loader
            has no use for.
    """
    if collate_fn is not None and (callable(dataset) or not _has_rows(dataset)):
        raise TypeError("collate_fn: the dataset is a loader, which collates by itself")
    if callable(dataset):
        return dataset  # type: ignore[no-any-return]
    if hasattr(dataset, "batch_sampler"):
        return _of_torch(dataset, seed)
    if _has_rows(dataset):
        from torch.utils.data import default_collate

        return partial(
            Loader,
            dataset,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
            collate_fn=Pairs(collate_fn or default_collate),
        )
    if hasattr(dataset, "batch_size") and hasattr(dataset, "__iter__"):
        return dataset  # type: ignore[no-any-return]
    raise TypeError(
        f"dataset: a {type(dataset).__name__} has no rows by number (a length and [i]), without "
        f"which no order could be resumed; for a stream, write a loader with batch_size, "
        f"state_dict and load_state_dict"
    )


def _has_rows(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _of_torch(loader: Any, seed: int) -> DataLoaderFactory:
    from torch.utils.data import RandomSampler, SequentialSampler

    own = [
        name
        for name, there in {
            "batch_sampler": loader.batch_size is None,
            "sampler": type(loader.sampler) not in (RandomSampler, SequentialSampler),
            "worker_init_fn": loader.worker_init_fn is not None,
        }.items()
        if there
    ]
    if own or not _has_rows(loader.dataset):
        raise TypeError(
            f"dataset: this DataLoader has {' and '.join(own) or 'no rows by number'}, which "
            f"neither ranks nor a resumed run could share; pass its dataset with collate_fn and "
            f"batch_size, or a loader with state_dict and load_state_dict"
        )
    return partial(
        Loader,
        loader.dataset,
        loader.batch_size,
        seed=seed,
        shuffle=type(loader.sampler) is RandomSampler,
        num_workers=loader.num_workers,
        collate_fn=Pairs(loader.collate_fn),
        pin_memory=loader.pin_memory,
    )
