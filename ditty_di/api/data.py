"""A Hugging Face dataset, from loading it to the trainer's batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from ditty_di.data import CausalCollate, LengthGroupedSampler, Loader
from ditty_di.data.operations import Operation, prepare
from ditty_di.messages import did_you_mean
from ditty_di.protocols import DataLoaderFactory


@dataclass(kw_only=True, eq=False, repr=False)
class Data:
    """Load a dataset, change it by its own methods, and make a loader of it.

    Args:
        load_kwargs: of `datasets.load_dataset`; or pass `dataset`.
        dataset: one that is loaded; or records or text files (`ditty_di.data.records`,
            `ditty_di.data.tokenization.TextFiles`).
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

    def prepare(self, operations: Sequence[Operation] = ()) -> DataLoaderFactory:
        """Return the loader of the changed dataset, for the trainer or a pipeline to complete.

        Every rank runs the operations; results of files are cached by content, so that only the
        first run has the work (`ditty_di.data.prepare`).

        Args:
            operations: each a callable of a dataset, or the name of a method of `datasets.Dataset`,
                its positional arguments, and its keyword arguments in a mapping at the end:
                `("filter", keep, {})`, `("map", tokenize, {"batched": True})`,
                `("rename_column", "a", "b", {})`.

        Raises:
            ValueError: no method of this name; no row or column left that training reads.
            TypeError: a method that does not return a dataset.
        """
        dataset = prepare(self.dataset, operations)
        order = None
        if self.group_by_length:
            column = self.length_column_name or "input_ids"
            _require(column, dataset, "group_by_length")
            values = dataset[column]
            lengths = list(values) if self.length_column_name else list(map(len, values))
            size = self.batch_size * self.grad_accum
            order = partial(
                LengthGroupedSampler, dataset=SimpleNamespace(lengths=lengths), group_size=size
            )
        if (read := getattr(self.collator, "columns", None)) is not None:
            _require(read[0], dataset, "the collator")
            if self.remove_unused_columns:
                dataset = dataset.select_columns([c for c in dataset.column_names if c in read])
        same = ("seed", "shuffle", "num_workers", "pin_memory", "drop_last")
        options: Any = {name: getattr(self, name) for name in same}
        return partial(
            Loader, dataset, self.batch_size, collate_fn=self.collator, sampler=order, **options
        )


def _require(column: str, dataset: Any, reader: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"Data: {reader} reads {column!r}, but the dataset has "
            f"{', '.join(map(repr, dataset.column_names))}; make it in a ('map', ...), or pass a "
            f"collator of your own"
        )
