"""Datasets that are changed by their own methods, and what comes out of the loader."""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import sys
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset

from ditty_di.api.data import Data
from ditty_di.data import CausalCollate, prepare
from ditty_di.data import records as records_of
from ditty_di.data.tokenization import TextFiles
from tests import warm


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


def test_records_of_files_are_a_dataset_that_is_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    module, calls = tmp_path / "own_operations.py", tmp_path / "calls"
    code = (
        "def to_ids(row, number=1):\n"
        "    with open({calls!r}, 'a') as file: file.write('x')\n"
        "    return {{'input_ids': [{factor} * number] * len(row['text'])}}\n"
    )

    def run(factor=1, records=("ab", "abc"), number=1):
        module.write_text(code.format(calls=str(calls), factor=factor))
        sys.modules.pop("own_operations", None)
        importlib.invalidate_caches()
        (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{r}"}}\n' for r in records))
        calls.write_text("")
        own = importlib.import_module("own_operations")
        source = records_of(tmp_path / "data.jsonl", validation_fraction=0)
        operation = partial(Dataset.map, function=own.to_ids, fn_kwargs={"number": number})
        rows = prepare(source, [operation, None])
        return [row["input_ids"] for row in rows], len(calls.read_text())

    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        assert run() == ([[1, 1], [1, 1, 1]], 2)
        assert run() == ([[1, 1], [1, 1, 1]], 0), "not cached"
        assert run(number=4) == ([[4, 4], [4, 4, 4]], 2), "other arguments"
        assert run(factor=7) == ([[7, 7], [7, 7, 7]], 2), "the function's code has changed"
        assert run(records=["abcd"]) == ([[1, 1, 1, 1]], 1), "the file has changed"
        assert run(factor=7)[1] == 0
    finally:
        sys.dont_write_bytecode = before


def test_text_files_are_a_dataset_too(tmp_path, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    found = prepare(TextFiles([tmp_path / "a.txt", tmp_path / "b.jsonl"], documents="line"))
    assert sorted(found["text"]) == ["one", "three", "two"]
    rows = loader(Data(dataset=TextFiles(tmp_path / "a.txt")), [("map", ids_of_text, {})]).dataset
    assert rows["input_ids"] == [[ord(c) for c in "one\ntwo\n"]]
    (tmp_path / "b.jsonl").write_text('{"text": "thr')
    with pytest.raises(ValueError, match=r"b\.jsonl: byte 9: not JSON"):
        prepare(TextFiles(tmp_path / "b.jsonl"))


def ids_of_text(row):
    return {"input_ids": list(map(ord, row["text"]))}


@pytest.mark.parametrize(
    "operations, said",
    [
        (["map"], r"operations=.*'map'.*\(number 0\): write a node"),
        ({"a": None, "b": 3}, r"\(number 0\): write a node"),
        ([[]], "write a node"),
        ([lambda dataset: 3], "'<lambda>' returned int, not a dataset"),
    ],
)
def test_what_is_no_operation_is_said(operations, said):
    with pytest.raises((ValueError, TypeError), match=said):
        prepare(words(), operations)


def test_operations_are_nodes_of_a_configuration(tmp_path):
    """Two ranks: the first does the work; what a mistyped method says comes before the run."""
    lines = [{"text": f"one two three {n}", "keep": n % 2} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mylib.py").write_text("def kept(row):\n    return row['keep'] == 1\n")
    operation = "{_target_: datasets.Dataset.filter, _partial_: true, function: {_target_: %s}}"
    kept = operation % "mylib.kept, _partial_: true"
    arguments = (
        *("+experiment=pretrain", "data=prepared", "data.path=data.jsonl", "data.text_key=text"),
        *("data.validation_fraction=0.1", "max_steps=2", "launcher.nproc=2", "validator=none"),
        *("data.loader.micro_batch_size=1", "global_batch_size=4", "export=none", "run=mine"),
        *("model.config.hidden_size=16", "model.config.intermediate_size=16"),
    )
    environment = {"DITTY_DI_CACHE": str(tmp_path / "cache")}
    done = warm.run(
        ["-m", "ditty_di", *arguments, f"+data.operations.kept={kept}"],
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "filter: " in (tmp_path / "mine/logs/rank-1.log").read_text()
    wrong = operation.replace("filter", "fliter") % "mylib.kept, _partial_: true"
    done = warm.run(
        ["-m", "ditty_di", "task=check", *arguments, f"+data.operations.kept={wrong}"],
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode and "did you mean 'filter'" in done.stderr
