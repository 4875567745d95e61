"""A Hugging Face dataset, from loading it to the trainer's batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ditty_di.config.targets import did_you_mean
from ditty_di.data import LengthGrouped, Loader, PaddedCollate
from ditty_di.protocols import DataLoaderFactory, LoadedBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CausalCollate:
    """Collate tokenized rows for a causal language model: each token's label is the next token.

    Reads `input_ids`, and if there are such columns: `labels`, a copy of them with `ignore_index`
    where there is no loss, and `attention_mask`, whose zeros (padding by the tokenizer) are left
    out. Rows are padded as by `ditty_di.data.PaddedCollate`, and masked by position, not by id.

    Args:
        pad_id: token that pads rows; None is 0.
        ignore_index: label value excluded from the loss.
    """

    pad_id: int | None = None
    ignore_index: int = -100
    columns = ("input_ids", "labels", "attention_mask")
    contract = "-> input:2:i64 | ctx.target:2:i64"
    fills = True

    def __call__(self, rows: list[Mapping[str, Any] | None]) -> LoadedBatch:
        """Collate rows.

        Args:
            rows: of one micro-batch; None is a padding row.
        """
        pad = PaddedCollate(pad_id=self.pad_id, ignore_index=self.ignore_index)
        return pad([None if row is None else _shifted(row) for row in rows])


def _shifted(row: Mapping[str, Any]) -> Any:
    ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)  # [seq]
    labels = torch.as_tensor(row.get("labels", ids), dtype=torch.int64)
    if "attention_mask" in row:
        kept = torch.as_tensor(row["attention_mask"]).bool()
        ids, labels = ids[kept], labels[kept]
    return {"input": ids[:-1]}, labels[1:]


@dataclass(kw_only=True, eq=False, repr=False)
class Data:
    """Load a dataset, change it by its own methods, and make a loader of it.

    Args:
        load_kwargs: of `datasets.load_dataset`; or pass `dataset`.
        dataset: one that is loaded.
        tokenizer: its pad token pads batches; None pads with 0, which has no label.
        seed: of the order of rows.
        batch_size: rows per micro-batch and rank.
        grad_accum: micro-batches per step; with `group_by_length`, the rows of one step have
            similar lengths.
        split: of a dataset that has several.
        group_by_length: group rows of similar lengths, to pad little.
        length_column_name: the column of lengths; None counts `input_ids`.
        collator: makes `(inputs, labels)` of a list of rows; None is `CausalCollate`.
        remove_unused_columns: after all operations, keep only the columns that the collator names
            in its attribute `columns`. A collator without one gets all of them.
        shuffle: of `ditty_di.data.Loader`, as are the rest.
        num_workers: processes that load data.
        pin_memory: whether batches are in pinned memory.
        drop_last: whether to leave out an incomplete last batch.

    Raises:
        ValueError: not exactly one of `load_kwargs` and `dataset`; no such split.
    """

    load_kwargs: Mapping[str, Any] | None = None
    dataset: Any = None
    tokenizer: Any = None
    seed: int = 0
    batch_size: int = 4
    grad_accum: int = 1
    split: str = "train"
    group_by_length: bool = False
    length_column_name: str | None = None
    collator: Callable[[list[Any]], Any] | None = None
    remove_unused_columns: bool = True
    shuffle: bool = True
    num_workers: int = 0
    pin_memory: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        if (self.load_kwargs is None) == (self.dataset is None):
            raise ValueError("Data: write either load_kwargs={'path': ...} or dataset=")
        if self.load_kwargs is not None:
            from datasets import load_dataset

            self.dataset = load_dataset(**self.load_kwargs)
        if isinstance(self.dataset, Mapping):  # a DatasetDict
            if self.split not in self.dataset:
                hint = did_you_mean(self.split, self.dataset)
                raise ValueError(
                    f"Data: there is no split={self.split!r}{hint}; the dataset has "
                    f"{', '.join(map(repr, self.dataset))}"
                )
            self.dataset = self.dataset[self.split]
        if self.collator is None:
            pad_id = None if self.tokenizer is None else self.tokenizer.pad_token_id
            self.collator = CausalCollate(pad_id=pad_id)

    def prepare(self, operations: Sequence[Sequence[Any]] = ()) -> DataLoaderFactory:
        """Return the loader of the changed dataset, for the trainer or a pipeline to complete.

        Every rank runs the operations; `datasets` caches the results of files, so that only the
        first run has the work.

        Args:
            operations: each the name of a method of `datasets.Dataset`, its positional arguments,
                and its keyword arguments in a mapping at the end: `("filter", keep, {})`,
                `("map", tokenize, {"batched": True})`, `("rename_column", "a", "b", {})`.

        Raises:
            ValueError: no method of this name; no row or column left that training reads.
            TypeError: a method that does not return a dataset.
        """
        dataset = self.dataset
        for operation in operations:
            dataset = _changed(dataset, *operation)
        order = None
        if self.group_by_length:
            column = self.length_column_name or "input_ids"
            _require(column, dataset, "group_by_length")
            values = dataset[column]
            lengths = list(values) if self.length_column_name else list(map(len, values))
            size = self.batch_size * self.grad_accum
            order = partial(
                LengthGrouped, dataset=SimpleNamespace(lengths=lengths), group_size=size
            )
        if (read := getattr(self.collator, "columns", None)) is not None:
            _require(read[0], dataset, "the collator")
            if self.remove_unused_columns:
                dataset = dataset.select_columns([c for c in dataset.column_names if c in read])
        return partial(
            Loader,
            dataset,
            self.batch_size,
            seed=self.seed,
            collate_fn=self.collator,
            order=order,
            shuffle=self.shuffle,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            drop_last=self.drop_last,
        )


def _changed(dataset: Any, name: str, *arguments: Any) -> Any:
    """Return what a method of a dataset returns for the arguments of an operation."""
    *positional, options = arguments or ({},)
    if not isinstance(options, Mapping):
        raise ValueError(
            f"Data.prepare: {name!r} ends with {type(options).__name__}; write its keyword "
            f"arguments as a mapping at the end, {{}} for none"
        )
    methods = [n for n in dir(dataset) if n[0] != "_" and callable(getattr(dataset, n, None))]
    if name not in methods:
        kind = type(dataset).__name__
        raise ValueError(
            f"Data.prepare: {kind} has no method {name!r}{did_you_mean(name, methods)}; write a "
            f"method of datasets.{kind} that returns a dataset"
        )
    changed = getattr(dataset, name)(*(a for a in positional if a is not None), **options)
    if not (hasattr(changed, "column_names") and hasattr(changed, "__len__")):
        raise TypeError(f"Data.prepare: {name!r} returned {type(changed).__name__}, not a dataset")
    log.info("%s: %d rows, now %d", name, len(dataset), len(changed))
    if not len(changed):
        raise ValueError(f"Data.prepare: no row of {len(dataset)} is left after {name!r}")
    return changed


def _require(column: str, dataset: Any, reader: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"Data: {reader} reads {column!r}, but the dataset has "
            f"{', '.join(map(repr, dataset.column_names))}; make it in a ('map', ...), or pass a "
            f"collator of your own"
        )
