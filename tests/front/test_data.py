"""Datasets that are changed by their own methods, and what comes out of the loader."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset

from ditty_di.front.data import CausalCollate, Data


def words(rows: int = 40) -> Dataset:
    lengths = np.random.default_rng(0).integers(1, 30, rows).tolist()
    return Dataset.from_list([{"text": "x" * n, "number": i} for i, n in enumerate(lengths)])


def tokenized(row):
    return {"input_ids": [row["number"] + 1] * (len(row["text"]) + 1)}


def loader(data, operations=(), **place):
    return data.prepare(operations)(**{"dp_rank": 0, "dp_world_size": 1, **place})


def epoch(loader, rows=40):
    """Row numbers of one epoch of micro-batches, as they come."""
    batches = iter(loader)
    seen = []
    while len(seen) < rows:
        inputs, _ = next(batches)
        seen += (inputs["input"][:, 0] - 1).tolist()
    return seen


def test_a_filter_filters_and_says_so(caplog):
    caplog.set_level(logging.INFO, "ditty_di")
    long = ("filter", lambda row: len(row["text"]) > 14, {})
    kept = loader(Data(dataset=words()), [("map", tokenized, {}), long]).dataset
    expected = sum(len(text) > 14 for text in words()["text"])
    assert 0 < len(kept) == expected < 40
    assert f"filter: 40 rows, now {expected}" in caplog.text
    assert all(len(row["input_ids"]) > 15 for row in kept)


def test_operations_come_in_their_order_with_their_arguments():
    operations = [
        ("rename_column", "text", "words", {}),
        ("shuffle", {"seed": 1}),
        ("select", range(10), {}),
        ("map", lambda rows: {"input_ids": [[n, n] for n in rows["number"]]}, {"batched": True}),
        ("sort", "number", {"reverse": True}),
        ("flatten_indices", None, {}),
    ]
    rows = loader(Data(dataset=words(), remove_unused_columns=False), operations).dataset
    assert rows.column_names == ["words", "number", "input_ids"]
    assert rows["number"] == sorted(words().shuffle(seed=1)["number"][:10], reverse=True)


def test_of_the_columns_only_those_that_are_read_stay():
    operations = [("map", tokenized, {})]
    assert loader(Data(dataset=words()), operations).dataset.column_names == ["input_ids"]
    assert len(loader(Data(dataset=words()), operations).dataset) == 40

    def own(rows):
        return {"input": torch.tensor([row["number"] for row in rows])}, torch.zeros(len(rows))

    everything = loader(Data(dataset=words(), collator=own), operations)
    assert everything.dataset.column_names == ["text", "number", "input_ids"]
    assert next(iter(everything))[0]["input"].shape == (4,)


@pytest.mark.parametrize(
    "operations, said",
    [
        ([("fliter", len, {})], "did you mean 'filter'"),
        ([("_map", len, {})], "no method '_map'"),
        ([("column_names", {})], "no method 'column_names'"),
        ([("to_list", {})], "'to_list' returned list"),
        ([("filter", lambda row: False, {})], "no row of 40 is left after 'filter'"),
        ([("map", tokenized)], "'map' ends with function"),
        ([], "the collator reads 'input_ids', but the dataset has 'text', 'number'"),
    ],
)
def test_what_cannot_be_done_is_said(operations, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Data(dataset=words()).prepare(operations)


def test_one_split_of_a_dataset_that_has_several(tmp_path):
    splits = DatasetDict(train=words(8), test=words(3))
    assert len(Data(dataset=splits, split="test").dataset) == 3
    with pytest.raises(ValueError, match=r"did you mean 'train'"):
        Data(dataset=splits, split="trian")
    words(5).to_json(tmp_path / "rows.jsonl")
    files = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}
    loaded = Data(load_kwargs={**files, "cache_dir": str(tmp_path / "cache")})
    assert loaded.dataset["number"] == load_dataset(**files, split="train")["number"]
    for both in ({}, {"load_kwargs": files, "dataset": splits}):
        with pytest.raises(ValueError, match="either load_kwargs"):
            Data(**both)


def test_a_token_predicts_the_next_and_padding_is_known_by_its_place():
    rows = [
        {"input_ids": [5, 6, 2]},
        {"input_ids": [7, 2, 2, 2], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        None,
    ]
    inputs, labels = CausalCollate(pad_id=2)(rows)
    assert inputs["input"].tolist() == [[5, 6, 2], [7, 2, 2], [1, 2, 3], [2, 2, 2]]
    assert labels.tolist() == [[6, 2, -100], [2, -100, -100], [-100, 3, 4], [-100] * 3]
    pickle.loads(pickle.dumps(CausalCollate(pad_id=2)))


@pytest.mark.parametrize("column", [None, "length"])
def test_lengths_are_grouped_and_every_row_comes_once_an_epoch(column):
    def measured(row):
        return {**tokenized(row), "length": len(row["text"])}

    data = Data(
        dataset=words(),
        batch_size=4,
        grad_accum=2,
        group_by_length=True,
        length_column_name=column,
    )
    grouped = loader(data, [("map", measured, {})])
    assert grouped.dataset.column_names == ["input_ids"]
    first = epoch(grouped)
    assert sorted(first) == list(range(40))
    lengths = [len(words()[row]["text"]) for row in first]
    by_step = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 40, 8)]
    assert max(by_step) < max(lengths) - min(lengths)
    shuffled = loader(Data(dataset=words(), batch_size=4), [("map", tokenized, {})])
    assert sum(by_step) < sum(
        max(part) - min(part)
        for part in np.array([len(words()[r]["text"]) for r in epoch(shuffled)]).reshape(5, 8)
    )


@pytest.mark.parametrize("ranks, batch_size", [(1, 4), (2, 2), (2, 4)])
@pytest.mark.parametrize("grouped", [False, True])
def test_another_number_of_ranks_goes_on_with_the_rows_that_are_left(ranks, batch_size, grouped):
    operations = [("map", tokenized, {})]
    data = Data(dataset=words(), seed=3, batch_size=4, group_by_length=grouped)
    whole = epoch(loader(data, operations))
    first = loader(data, operations)
    batches = iter(first)
    done = [n for _ in range(4) for n in (next(batches)[0]["input"][:, 0] - 1).tolist()]
    assert done == whole[:16]
    data.batch_size = batch_size
    if grouped:  # a step has as many rows as before
        data.grad_accum = 4 // batch_size
    parts = []
    for rank in range(ranks):
        part = loader(data, operations, dp_rank=rank, dp_world_size=ranks)
        part.load_state_dict(first.state_dict())
        parts.append(epoch(part, 24 // ranks))
    size = batch_size
    mixed = [n for i in range(0, 24 // ranks, size) for part in parts for n in part[i : i + size]]
    assert mixed == whole[16:]
