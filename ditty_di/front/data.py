"""A Hugging Face dataset, from its loading to the trainer's batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ditty_di.config.targets import did_you_mean
from ditty_di.data import LengthGrouped, Loader, PaddedCollate

if TYPE_CHECKING:
    from ditty_di.protocols import Batch, DataLoaderFactory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CausalCollate:
    """Tokenized rows for a causal language model: each token's label is the next one.

    Reads `input_ids`, and where there are such columns: `labels`, a copy of them with
    `ignore_index` where nothing is learnt, and `attention_mask`, whose zeros (padding of the
    tokenizer's) are left out. Padded as by `ditty_di.data.PaddedCollate`, by place and not by id.
    """

    pad_id: int | None = None
    ignore_index: int = -100
    columns = ("input_ids", "labels", "attention_mask")
    contract = "-> input:2:i64 | ctx.target:2:i64"
    fills = True

    def __call__(self, rows: list[Mapping[str, Any] | None]) -> Batch:
        pad = PaddedCollate(pad_id=self.pad_id, ignore_index=self.ignore_index)
        return pad([None if row is None else self._shifted(row) for row in rows])

    def _shifted(self, row: Mapping[str, Any]) -> Any:
        import torch

        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        labels = torch.as_tensor(row.get("labels", ids), dtype=torch.int64)
        if "attention_mask" in row:
            there = torch.as_tensor(row["attention_mask"]).bool()
            ids, labels = ids[there], labels[there]
        return {"input": ids[:-1]}, labels[1:]


class Data:
    """Loads a dataset, changes it by its own methods, and makes a loader of it.

    Args:
        load_kwargs: of `datasets.load_dataset`; or `dataset`, one that is loaded.
        tokenizer: its pad token fills up batches; None fills with 0, which no label counts.
        seed: of the order of rows.
        batch_size: rows a micro-batch and rank.
        grad_accum: micro-batches a step; rows of one step have similar lengths if
            `group_by_length`.
        split: of a dataset that has several.
        group_by_length: similar lengths together, so that there is little padding.
        length_column_name: where lengths are; None counts `input_ids`.
        collator: makes `(inputs, labels)` of a list of rows; None is `CausalCollate`.
        remove_unused_columns: after all operations, leave only the columns that the collator names
            in its attribute `columns`. A collator without one gets all of them.
        shuffle, num_workers, pin_memory, drop_last: of `ditty_di.data.Loader`.

    Raises:
        ValueError: not exactly one of `load_kwargs` and `dataset`; no such split.
    """

    def __init__(
        self,
        *,
        load_kwargs: Mapping[str, Any] | None = None,
        dataset: Any = None,
        tokenizer: Any = None,
        seed: int = 0,
        batch_size: int = 4,
        grad_accum: int = 1,
        split: str = "train",
        group_by_length: bool = False,
        length_column_name: str | None = None,
        collator: Callable[[list[Any]], Any] | None = None,
        remove_unused_columns: bool = True,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
    ) -> None:
        if (load_kwargs is None) == (dataset is None):
            raise ValueError("Data: write either load_kwargs={'path': ...} or dataset=")
        if load_kwargs is not None:
            from datasets import load_dataset

            dataset = load_dataset(**load_kwargs)
        if isinstance(dataset, Mapping):  # a DatasetDict
            if split not in dataset:
                raise ValueError(
                    f"Data: there is no split={split!r}{did_you_mean(split, dataset)}; the dataset "
                    f"has {', '.join(map(repr, dataset))}"
                )
            dataset = dataset[split]
        self.dataset = dataset
        pad_id = None if tokenizer is None else tokenizer.pad_token_id
        self.collator = collator or CausalCollate(pad_id=pad_id)
        self.seed, self.batch_size, self.grad_accum = seed, batch_size, grad_accum
        self.group_by_length, self.length_column_name = group_by_length, length_column_name
        self.remove_unused_columns = remove_unused_columns
        self.options: dict[str, Any] = {
            "shuffle": shuffle,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "drop_last": drop_last,
        }

    def prepare(self, operations: Sequence[Sequence[Any]] = ()) -> DataLoaderFactory:
        """The loader of the changed dataset, for the trainer or a pipeline to complete.

        Args:
            operations: each the name of a method of `datasets.Dataset`, its positional arguments,
                and its keyword arguments in a mapping at the end: `("filter", keep, {})`,
                `("map", tokenize, {"batched": True})`, `("rename_column", "a", "b", {})`.

        Every rank runs them; `datasets` keeps the results of files in its cache, so that only the
        first run has the work.

        Raises:
            ValueError: a name that is no method; no rows or no column left that training reads.
            TypeError: a method that returns no dataset.
        """
        dataset = self.dataset
        for operation in operations:
            dataset = self._changed(dataset, *operation)
        order = None
        if self.group_by_length:
            size = self.batch_size * self.grad_accum
            lengths = SimpleNamespace(lengths=self._lengths(dataset))
            order = partial(LengthGrouped, dataset=lengths, group_size=size)
        return partial(
            Loader,
            self._without_unused_columns(dataset),
            self.batch_size,
            seed=self.seed,
            collate_fn=self.collator,
            order=order,
            **self.options,
        )

    def _changed(self, dataset: Any, name: str, *arguments: Any) -> Any:
        *positional, options = arguments if arguments else ({},)
        if not isinstance(options, Mapping):
            raise ValueError(
                f"Data.prepare: {name!r} ends with {type(options).__name__}; write its keyword "
                f"arguments as a mapping at the end, {{}} for none"
            )
        methods = [n for n in dir(dataset) if n[0] != "_" and callable(getattr(dataset, n, None))]
        if name not in methods:
            kind = type(dataset).__name__
            raise ValueError(
                f"Data.prepare: {kind} has no method {name!r}{did_you_mean(name, methods)}; any "
                f"method of datasets.{kind} that returns one will do"
            )
        changed = getattr(dataset, name)(*(a for a in positional if a is not None), **options)
        if not (hasattr(changed, "column_names") and hasattr(changed, "__len__")):
            raise TypeError(
                f"Data.prepare: {name!r} returned {type(changed).__name__} and no dataset"
            )
        log.info("%s: %d rows, now %d", name, len(dataset), len(changed))
        if not len(changed):
            raise ValueError(f"Data.prepare: no row of {len(dataset)} is left after {name!r}")
        return changed

    def _lengths(self, dataset: Any) -> list[int]:
        column = self.length_column_name or "input_ids"
        self._require([column], dataset, "group_by_length")
        return [v if self.length_column_name else len(v) for v in dataset[column]]

    def _without_unused_columns(self, dataset: Any) -> Any:
        read = getattr(self.collator, "columns", None)
        if read is None:
            return dataset
        self._require(read[:1], dataset, "the collator")
        if not self.remove_unused_columns:
            return dataset
        return dataset.select_columns([name for name in dataset.column_names if name in read])

    def _require(self, columns: Sequence[str], dataset: Any, who: str) -> None:
        for column in columns:
            if column not in dataset.column_names:
                raise ValueError(
                    f"Data: {who} reads {column!r}, but the dataset has "
                    f"{', '.join(map(repr, dataset.column_names))}; make it in a ('map', ...), or "
                    f"pass a collator of your own"
                )
