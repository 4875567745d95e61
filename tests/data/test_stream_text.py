"""Text that is tokenized while it is read, by `datasets`: rows, splits, resumes and training."""

import copy
import gzip
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import (
    Mixture,
    Shards,
    ShardsCollate,
    Streamed,
    StreamedText,
    StreamLoader,
    StreamSample,
    first_rows,
    iterable_dataset,
    train_bpe,
)
from ditty_di.data.reading.remote import upload
from ditty_di.data.shards import IndexWriter, Manifest
from tests import warm
from tests.warm import ditty_di

EOS = 0


@pytest.fixture(scope="module")
def texts():
    draw = np.random.default_rng(0)
    words = ["one", "two", "three", "green", "tree", "house"]
    return [" ".join(draw.choice(words, draw.integers(1, 30))) for _ in range(120)]


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        lines = [
            json.dumps({"text": text}) + "\n" for text in texts[number * 30 : number * 30 + 30]
        ]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return iterable_dataset(f"{folder}/*.jsonl")


@pytest.fixture(scope="module")
def tokenizer(texts, cache_dir):
    return train_bpe(texts, 300, cache_dir=cache_dir)


def rows_of(loader, number):
    batches = iter(loader)
    found = []
    while len(found) < number:
        inputs, labels = next(batches)
        for row in range(len(labels)):
            found.append([*inputs["input"][row].tolist(), *labels[row].tolist()])
    return found[:number]


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("documents", ["masked", "joined"])
def test_rows_are_those_of_shards_of_the_same_documents(
    source, texts, tokenizer, tmp_path, streams, documents
):
    dataset = StreamedText(
        *(source, tokenizer, 16),
        documents=documents,
        streams=streams,
        shuffle_rows=1,
        validation_fraction=0,
    )
    for stream in range(streams):
        own = texts if streams == 1 else texts[stream * 30 : stream * 30 + 30]
        path = tmp_path / str(stream)
        path.mkdir()
        with IndexWriter.open(path / "train-0", "<u2") as writer:
            for ids in tokenizer(own)["input_ids"]:
                writer.add([*ids, EOS])
        Manifest("k", "t", 300, EOS, 0, (writer.shard("train"),)).write(path)
        expected = Shards(path, 16, documents=documents)
        rows = [dataset.finish(row) for _, row in dataset.rows(stream, once=True)]
        assert len(rows) == len(expected)
        for (inputs, labels), (wanted, targets) in zip(rows, expected, strict=True):
            assert labels.equal(targets) and inputs.keys() == wanted.keys()
            assert all(value.equal(wanted[name]) for name, value in inputs.items())


@settings(max_examples=15, deadline=None)
@given(
    stops=st.lists(st.integers(0, 60), min_size=2, max_size=2),
    streams=st.sampled_from([1, 2, 3, 4]),
    block=st.sampled_from([1, 7]),
)
def test_text_is_resumed_in_the_middle_of_documents(source, tokenizer, stops, streams, block):
    """Three streams of four files: each reads all and takes every third document."""
    dataset = StreamedText(source, tokenizer, 11, streams=streams, shuffle_rows=block)
    whole = rows_of(StreamLoader(dataset, 1, collate_fn=ShardsCollate()), 140)
    seen, state = [], None
    for stop in (*stops, 20):
        loader = StreamLoader(dataset, 1, collate_fn=ShardsCollate())
        if state is not None:
            loader.load_state_dict(copy.deepcopy(state))
        seen += rows_of(loader, stop)
        state = loader.state_dict()
    assert seen == whole[: len(seen)]


def test_each_worker_reads_its_streams_of_datasets(source, tokenizer):
    """Which split themselves among a loader's workers, where they are not kept from it."""
    dataset = StreamedText(source, tokenizer, 11, streams=4, shuffle_rows=5)

    def loader(**options):
        return StreamLoader(dataset, 2, collate_fn=ShardsCollate(), **options)

    whole = rows_of(loader(), 200)
    assert rows_of(loader(num_workers=2), 200) == whole
    half = loader(num_workers=2)
    rows_of(half, 70)
    rest = loader(num_workers=1)
    rest.load_state_dict(half.state_dict())
    assert rows_of(rest, 50) == whole[70:120]


def test_held_out_documents_are_validated_on_and_nothing_else(source, texts, tokenizer):
    options = {"validation_fraction": 0.2, "streams": 1, "shuffle_rows": 1, "documents": "joined"}
    tokens = {}
    for split in ("train", "validation"):
        dataset = StreamedText(source, tokenizer, 16, split=split, **options)
        rows = first_rows(dataset, 10_000)
        labels = [label for _, row in rows for label in row.tolist() if label != -100]
        tokens[split] = tokenizer.decode([int(rows[0][0]["input"][0]), *labels])
    found = {split: text.split("<|endoftext|>")[:-1] for split, text in tokens.items()}
    assert Counter(found["train"]) + Counter(found["validation"]) == Counter(texts)
    assert 10 < len(found["validation"]) < 40
    assert [*StreamSample(source, validation_fraction=0.2)] == found["train"]
    assert len([*StreamSample(source, sample_mb=0.001)]) < 20
    assert len(first_rows(StreamedText(source, tokenizer, 16, streams=4), 7)) == 7


def test_a_sample_is_read_by_another_thread_than_its_dataset_was_made_by(source, texts):
    """A copy of a dataset would add a Hub file system of this thread to those being copied."""
    with ThreadPoolExecutor(1) as pool:
        sample = StreamSample(source, validation_fraction=0.0)
        assert pool.submit(list, sample).result() == texts


def test_files_of_any_kind_and_place_are_read_in_the_order_of_their_names(
    source, folder, texts, tmp_path, s3
):
    assert [example["text"] for example in source] == texts
    upload(folder, f"{s3}/texts", [path.name for path in folder.iterdir()])
    for path in (folder, [str(folder / f"{n}.jsonl") for n in range(4)], f"{s3}/texts/*.jsonl"):
        found = iterable_dataset(path)
        assert found.num_shards == 4 and [example["text"] for example in found] == texts
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    assert [example["text"] for example in iterable_dataset(tmp_path)] == texts
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match=r"files of .jsonl, .txt; a stream has one kind"):
        iterable_dataset(tmp_path)
    for path in ("none", f"{s3}/none", str(tmp_path / "*.csv")):
        with pytest.raises(FileNotFoundError, match="no text at path="):
            iterable_dataset(path)


def test_a_shuffle_buffer_and_a_state_that_is_not_exact_are_refused(source):
    for shuffled in (
        source.shuffle(seed=0, buffer_size=10),
        source.shuffle(seed=0, buffer_size=10).map(lambda example: example),
        datasets.interleave_datasets([source, source.shuffle(seed=0)]),
    ):
        with pytest.raises(ValueError, match=r"leave its shuffle.* out .* shuffle by shuffle_rows"):
            next(iter(StreamLoader(Streamed(shuffled, streams=1), 1, collate_fn=list)))


def test_bad_text_and_splits_without_any_are_refused(source, tokenizer):
    with pytest.raises(ValueError, match=r'example 0 of stream 0: no key "body" among \[.text.\]'):
        first_rows(StreamedText(source, tokenizer, 8, text_key="body"), 1)
    nothing = StreamedText(
        source, tokenizer, 8, split="validation", validation_fraction=0, streams=1
    )
    with pytest.raises(ValueError, match="nothing is held out, so raise validation_fraction"):
        first_rows(nothing, 1)
    with pytest.raises(ValueError, match="none of its examples has text of the split 'validation'"):
        nothing.open(0, 0)


def test_a_mixture_by_row_numbers_names_the_one_for_streams(source, tokenizer):
    with pytest.raises(ValueError, match=r"sources \['text'\] are read in sequence: take"):
        Mixture({"text": StreamedText(source, tokenizer, 8)})


def test_check_finds_streams_that_do_not_divide_among_the_ranks(folder, tmp_path):
    arguments = ["-m", "ditty_di", "task=check", "+experiment=pretrain", "data=stream"]
    arguments += [f"data.path={folder}/*.jsonl", "global_batch_size=null"]
    for ranks, code in ((2, 0), (3, 2)):
        done = warm.run([*arguments, "data.streams=4", f"launcher.nproc={ranks}"], cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
    assert "streams=4 of the data is not a multiple of the 3 data-parallel ranks" in done.stderr


@pytest.mark.slow
def test_a_resume_on_other_ranks_is_the_uninterrupted_training(folder, tmp_path):
    small = [
        *("+experiment=pretrain", "data=stream", f"data.path={folder}/*.jsonl", "data.seq_len=32"),
        *("data.streams=4", "data.shuffle_rows=8", "data.validation_fraction=0.1"),
        *("global_batch_size=8", "data.loader.micro_batch_size=2", "tokenizer.vocab_size=300"),
        *("lr_scheduler=none", "logger.log_interval=1", "export=none", "data.sample_text=null"),
        *("model.config.hidden_size=32", "model.config.num_hidden_layers=1"),
        *("model.config.intermediate_size=32", "validator.max_batches=2"),
    ]
    ditty_di(tmp_path, *small, "run=whole", "max_steps=6", "launcher.nproc=1")
    ditty_di(tmp_path, *small, "run=parts", "max_steps=2", "launcher.nproc=2")
    for steps, nproc, workers in ((4, 1, 2), (6, 2, 1)):
        changed = [f"launcher.nproc={nproc}", f"data.loader.num_workers={workers}"]
        allowed = "resume.allow=[data.loader.num_workers]"
        ditty_di(tmp_path, "run=parts", f"max_steps={steps}", *changed, allowed)
    whole, parts = (logged(tmp_path / run) for run in ("whole", "parts"))
    assert [*whole] == [*parts] == [1, 2, 3, 4, 5, 6]
    for step, values in whole.items():
        assert parts[step]["loss"] == pytest.approx(values["loss"], abs=2e-5)


def logged(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}
