"""Rows of shards in every format, and each thing that can be wrong with the files."""

import dataclasses
import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import Shards, ShardsCollate, train_bpe
from ditty_di.data.sampling.keyed import STORED_ROWS, KeyedSampler
from ditty_di.data.shards import IndexWriter, Manifest
from ditty_di.data.shards.megatron import write_index
from ditty_di.data.tokens import tokenizer_fingerprint

DOCUMENTS = [[5, 6, 7, 0], [8, 9, 10, 11, 0], [12, 0], [13, 14, 15, 16, 17, 18, 0]]
FLAT = [token for document in DOCUMENTS for token in document]


def write(prefix, documents=DOCUMENTS, dtype="<u2", split="train"):
    with IndexWriter.open(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return writer.shard(split)


def write_folder(folder, *shards, vocab_size=300, tokenizer="t" * 64):
    made = [write(folder / f"train-{i:06d}", shard) for i, shard in enumerate(shards)]
    made.append(write(folder / "validation-000000", [[50, 51, 52, 0]], split="validation"))
    Manifest("k", tokenizer, vocab_size, 0, 0.05, tuple(made)).write(folder)
    return folder


def write_datatrove(path, metadata="gpt2|2\n18\n18"):
    np.array(FLAT, "<u2").tofile(path)
    np.cumsum([len(d) for d in DOCUMENTS]).astype("<u8").tofile(f"{path}.index")
    if metadata:
        Path(f"{path}.metadata").write_text(metadata)
    return path


def write_dtt(path, tokens=FLAT):
    with path.open("wb") as stream:
        np.save(stream, np.array(tokens, np.uint32))
    return path


@pytest.fixture(scope="module")
def tokenizer(cache_dir):
    return train_bpe(["one two three"], 300, cache_dir=cache_dir)  # its EOS is 0


def rows_of(dataset):
    for index in range(len(dataset)):
        inputs, labels = dataset[index]
        yield {name: value.tolist() for name, value in inputs.items()}, labels.tolist()


def test_masked_rows_do_not_cross_documents(tmp_path):
    write_folder(tmp_path, DOCUMENTS)
    first, second, third = rows_of(Shards(tmp_path, 8))
    assert first == (
        {"input": [5, 6, 7, 0, 8, 9, 10, 11], "position_ids": [0, 1, 2, 3, 0, 1, 2, 3]},
        [6, 7, 0, -100, 9, 10, 11, 0],
    )
    assert second == (
        {"input": [0, 12, 0, 13, 14, 15, 16, 17], "position_ids": [0, 0, 1, 0, 1, 2, 3, 4]},
        [-100, 0, -100, 14, 15, 16, 17, 18],
    )
    assert third == (
        {"input": [18] + [0] * 7, "position_ids": [0, 0, 1, 2, 3, 4, 5, 6]},
        [0] + [-100] * 7,
    )


def test_joined_rows_follow_each_other(tmp_path):
    write_folder(tmp_path, DOCUMENTS)
    rows = [*rows_of(Shards(tmp_path, 8, documents="joined"))]
    assert [*rows[0][0]] == ["input"]
    labels = [label for _, row in rows for label in row]
    assert labels == [*FLAT[1:], *[-100] * 7]
    (inputs, _) = Shards(tmp_path, 8, "validation")[-1]
    assert inputs["input"].tolist() == [50, 51, 52, 0, 0, 0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4),
    seq_len=st.integers(1, 12),
    overlap=st.integers(0, 11),
)
def test_each_label_comes_once_whatever_the_windows(tmp_path_factory, sizes, seq_len, overlap):
    overlap = min(overlap, seq_len - 1)
    folder = tmp_path_factory.getbasetemp() / "windows"
    folder.mkdir(exist_ok=True)
    numbers = iter(range(1, 10_000))
    shards = [[[next(numbers) for _ in range(n)] for n in shard] for shard in sizes]
    write_folder(folder, *shards, vocab_size=10_000)
    flat = [[token for document in shard for token in document] for shard in shards]
    if all(len(shard) == 1 for shard in flat):
        return
    joined = Shards(folder, seq_len, documents="joined", overlap=overlap)
    seen = [label for _, labels in rows_of(joined) for label in labels if label != -100]
    assert seen == [token for shard in flat for token in shard[1:]]
    masked = Shards(folder, seq_len, overlap=overlap)
    seen = [label for _, labels in rows_of(masked) for label in labels if label != -100]
    assert seen == [token for shard in shards for document in shard for token in document[1:]]
    for inputs, labels in rows_of(masked):
        pairs = zip(inputs["input"], labels, strict=True)
        assert all(label in (-100, token + 1) for token, label in pairs)
        assert all(b in (0, a + 1) for a, b in pairwise(inputs["position_ids"]))


@pytest.mark.parametrize("name", ["a.bin", "a", "a.ds", "0_train__000000", "tokens.npy"])
@pytest.mark.parametrize("documents", ["masked", "joined"])
def test_formats_of_others_give_the_same_rows(tmp_path, tokenizer, name, documents):
    expected = [*rows_of(Shards(write_folder(tmp_path, DOCUMENTS), 8, documents=documents))]
    other = tmp_path / "other"
    other.mkdir()
    {"bin": write, "": write, "ds": write_datatrove}.get(
        name.partition(".")[2] if name[0] == "a" else "-", write_dtt
    )(other / name.removesuffix(".bin"))
    for path in (other / name, other, [other / name]):
        read = Shards(path, 8, documents=documents, tokenizer=tokenizer)
        assert [*rows_of(read)] == expected
        assert read.fingerprint() is None, "its rows are compared"
    with pytest.raises(
        ValueError, match=r"other: no shards of the split 'validation'.*\['train'\]"
    ):
        Shards(other, 8, "validation")


def test_dtts_names_say_the_split_and_wide_datatrove_ids_are_found(tmp_path):
    write_dtt(tmp_path / "0_train__000000")
    write_dtt(tmp_path / "0_val__000001", [1, 2, 3])
    assert Shards(tmp_path, 8, "validation")[0][1].tolist()[:3] == [2, 3, -100]
    path = write_datatrove(tmp_path / "b.ds", metadata=None)
    assert Shards(path, 8)[0][0]["input"].tolist() == FLAT[:8]
    np.array(FLAT, "<u4").tofile(path)
    assert Shards(path, 8)[0][0]["input"].tolist() == FLAT[:8]


def test_another_tokenizer_than_the_manifests_is_refused(tmp_path, tokenizer, cache_dir):
    write_folder(tmp_path, DOCUMENTS, tokenizer=tokenizer_fingerprint(tokenizer))
    Shards(tmp_path, 8, tokenizer=tokenizer)
    other = train_bpe(["four five"], 300, cache_dir=cache_dir)
    with pytest.raises(ValueError, match=r"manifest\.json: tokenizer .* made these shards"):
        Shards(tmp_path, 8, tokenizer=other)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("a.bin", lambda d: d[:-2], r"a\.bin: 34 bytes, expected 36 for 18 tokens of uint16"),
        ("a.idx", lambda d: d[:-1], r"a\.idx: \d+ bytes, expected \d+ for 4 sequences"),
        ("b.ds", lambda d: d[:-1], r"b\.ds: 35 bytes, expected 36 for 18 tokens"),
        ("b.ds.index", lambda d: d[:-1], r"b\.ds\.index: 31 bytes, expected a multiple of 8"),
        ("b.ds.index", lambda d: b"", r"b\.ds\.index: 0 bytes"),
        ("b.ds.metadata", lambda d: b"gpt2|3\n", r"b\.ds\.metadata: '3' bytes a token, expected"),
        ("c.npy", lambda d: d[:-1], r"c\.npy: \d+ bytes, expected \d+ for 18 tokens of uint32"),
        ("c.npy", lambda d: b"PK" + d[2:], r"c\.npy: byte 0: not the content of a \.npy file"),
        ("c.npy", lambda d: d.replace(b"'<u4'", b"'<f4'"), r"c\.npy: float32 of shape \(18,\)"),
    ],
)
def test_damaged_files_are_named_with_their_sizes(tmp_path, name, change, said):
    write(tmp_path / "a")
    write_datatrove(tmp_path / "b.ds")
    write_dtt(tmp_path / "c.npy")
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        Shards(tmp_path / {"a": "a.bin", "b": "b.ds", "c": "c.npy"}[name[0]], 8)


def test_what_is_missing_or_contradicts_the_manifest(tmp_path):
    folder = write_folder(tmp_path, DOCUMENTS)
    with pytest.raises(ValueError, match=r"no shards of the split 'test'"):
        Shards(folder, 8, "test")
    write(folder / "train-000000", DOCUMENTS[:-1])
    with pytest.raises(ValueError, match=r"train-000000\.bin: 11 tokens, but the manifest says 18"):
        Shards(folder, 8)[0]
    (folder / "manifest.json").unlink()
    (folder / "train-000000.idx").unlink()
    with pytest.raises(
        ValueError, match=r"train-000000\.bin: its index train-000000\.idx is missin"
    ):
        Shards(folder, 8)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        Shards(folder / "nowhere", 8)
    write_index(folder / "train-000000.idx", [1])
    (folder / "train-000000.bin").write_bytes(b"xx")
    with pytest.raises(ValueError, match="hardly any tokens"):
        Shards(folder / "train-000000", 8)


def test_an_id_outside_the_vocabulary_is_named_with_its_byte(tmp_path):
    folder = write_folder(tmp_path, DOCUMENTS, vocab_size=18)
    assert len(Shards(folder, 8)[0][1]) == 8
    with pytest.raises(
        ValueError, match=r"train-000000\.bin: byte 32: token id 18 does not fit .*18"
    ):
        Shards(folder, 8)[1]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    data = Shards(write_folder(tmp_path, DOCUMENTS), 8)
    data[0]
    os.truncate(tmp_path / "train-000000.bin", 20)
    with pytest.raises(ValueError, match=r"train-000000\.bin: byte 20: the file ends early"):
        data[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"documents": "apart"}, "documents='apart' must be one of masked, joined"),
        ({"overlap": 8}, "overlap=8 must be at least 0 and below seq_len=8"),
        ({"overlap": -1}, "overlap=-1 must be"),
    ],
)
def test_options_out_of_range(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        Shards(write_folder(tmp_path, DOCUMENTS), **{"seq_len": 8, **options})


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", ["bin", "ds", "dtt"])
def test_whole_documents_are_those_that_were_written(tmp_path, monkeypatch, tokenizer, name, block):
    monkeypatch.setattr("ditty_di.data.shards.dataset._BLOCK", block)
    if name == "bin":
        write_folder(tmp_path, DOCUMENTS, [[], *DOCUMENTS[::-1]])
    elif name == "ds":
        write_datatrove(tmp_path / "a.ds")
    else:
        write_dtt(tmp_path / "0_train__000000")
    shards = Shards(tmp_path, 4, tokenizer=None if name == "bin" else tokenizer)
    found = [ids.tolist() for ids in shards.whole_documents()]
    # A document without tokens begins where the next one does.
    assert found == [*DOCUMENTS, *(DOCUMENTS[::-1] if name == "bin" else [])]


def test_few_files_are_open_at_a_time(tmp_path):
    folder = write_folder(tmp_path, *[DOCUMENTS] * 9)
    data = Shards(folder, 8, max_open_files=6)
    before = len(os.listdir("/proc/self/fd"))
    whole = [*rows_of(data)]
    assert data.files.descriptors == 6 and len(os.listdir("/proc/self/fd")) == before + 6
    assert [*rows_of(pickle.loads(pickle.dumps(data)))] == whole
    assert len(data) == 27 and data.tokens == 9 * 18
    assert whole[:3] * 9 == whole


def test_only_large_sets_have_an_order_of_their_own(tmp_path):
    folder = write_folder(tmp_path, DOCUMENTS)
    assert Shards(folder, 8).sampler is None
    manifest = Manifest.read(folder)
    large = dataclasses.replace(manifest.shards[0], tokens=8 * STORED_ROWS + 10)
    dataclasses.replace(manifest, shards=(large,)).write(folder)
    assert Shards(folder, 8).sampler is KeyedSampler


def test_the_fingerprint_is_that_of_content_and_rows(tmp_path):
    folder = write_folder(tmp_path, DOCUMENTS)
    prints = {
        Shards(folder, 8).fingerprint(),
        Shards(folder, 7).fingerprint(),
        Shards(folder, 8, documents="joined").fingerprint(),
        Shards(folder, 8, overlap=2).fingerprint(),
        Shards(folder, 8, "validation").fingerprint(),
    }
    write_folder(tmp_path, DOCUMENTS[::-1])
    assert len({*prints, Shards(folder, 8).fingerprint()}) == 6


def test_a_micro_batch_is_what_its_contract_says(tmp_path):
    folder = write_folder(tmp_path, DOCUMENTS)
    for documents, names in (("masked", {"input", "position_ids"}), ("joined", {"input"})):
        data = Shards(folder, 8, documents=documents)
        collate = ShardsCollate(documents)
        inputs, labels = collate([data[0], data[1]])
        assert inputs["input"].shape == labels.shape == (2, 8)
        said = {
            name.strip().split(":")[0] for name in collate.contract[3:].split("|")[0].split(",")
        }
        assert said == inputs.keys() and said >= names
        assert collate.packs_documents == (documents == "masked")
    plain, _ = ShardsCollate(varlen=False)([Shards(folder, 8)[0]])
    assert plain.keys() == {"input", "position_ids"}
