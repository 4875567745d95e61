"""`.bin`/`.idx`, against megatron-core where it is installed, and damaged files."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data.shards.megatron import IndexWriter, MegatronIndex, token_dtype, write_index

DOCUMENTS = [[5, 6, 7, 0], [0], [8, 9, 10, 11, 0], [12, 0]]


def write(prefix, documents=DOCUMENTS, dtype="<u2", split="train"):
    with IndexWriter.open(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return writer.shard(split)


def test_the_bytes_are_those_of_the_format(tmp_path):
    shard = write(tmp_path / "a.b", [[1, 2], [3]])
    payload = (tmp_path / "a.b.bin").read_bytes()
    assert payload == struct.pack("<3H", 1, 2, 3)
    assert (tmp_path / "a.b.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q3q", 1, 8, 2, 3, 2, 1, 0, 4, 0, 1, 2)
    )
    assert (shard.name, shard.documents, shard.tokens, shard.dtype) == ("a.b", 2, 3, "<u2")
    assert shard.sha256 == hashlib.sha256(payload).hexdigest()


def test_wide_ids_and_documents_of_several_sequences(tmp_path):
    with IndexWriter.open(tmp_path / "a", token_dtype(1 << 17)) as writer:
        writer.add([1, 2], [70_000])
        writer.add()
        writer.add([4])
    index = MegatronIndex(tmp_path / "a.idx")
    assert np.fromfile(tmp_path / "a.bin", "<i4").tolist() == [1, 2, 70_000, 4]
    assert (index.documents, index.sequences, index.tokens) == (3, 3, 4)
    assert index.document_starts(0, 4).tolist() == [0, 3, 3]  # the second document is empty
    assert index.document_starts(1, 3).tolist() == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=30), st.data())
def test_document_starts_are_those_of_the_lengths(tmp_path_factory, lengths, data):
    path = tmp_path_factory.getbasetemp() / "a.idx"
    cuts = data.draw(st.lists(st.integers(0, len(lengths)), max_size=9).map(sorted))
    starts = np.cumsum([0, *lengths])
    for marks in (None, [0, *cuts, len(lengths)]):
        write_index(path, lengths, marks)
        index = MegatronIndex(path)
        documents = starts[marks[:-1]] if marks else starts[:-1]
        for start in range(index.tokens):
            for stop in {start, start + 1, min(start + 5, index.tokens)}:
                inside = documents[(documents >= start) & (documents < stop)]
                assert index.document_starts(start, stop).tolist() == inside.tolist()


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), IndexWriter.open(tmp_path / "a", "<u2") as writer:
        writer.add([1])
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="uint16 does not hold the token id 65536"):
        write(tmp_path / "a", [[1], [65_536]])
    with pytest.raises(ValueError, match="int32 does not hold the token id -1"):
        write(tmp_path / "a", [[1], [-1]], "<i4")
    with pytest.raises(ValueError, match=r"token type float32"):
        write_index(tmp_path / "b", [1], None, "<f4")
    with pytest.raises(ValueError, match="lengths must be"):
        write_index(tmp_path / "b", [1 << 31])
    with pytest.raises(ValueError, match="marks must rise from 0 to 2"):
        write_index(tmp_path / "b", [1, 1], [0, 1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", r"a\.idx: byte 0: not a Megatron index"),
        (lambda data: b"PK" + data[2:], r"a\.idx: byte 0: not a Megatron index.*PKID"),
        (lambda data: data[:20], r"a\.idx: 20 bytes, expected a header of 34"),
        (lambda data: data[:9] + b"\2" + data[10:], r"a\.idx: byte 9: version 2, expected 1"),
        (
            lambda data: data[:17] + b"\6" + data[18:],
            r"a\.idx: byte 17: token type 6, expected .*8",
        ),
        (lambda data: data[:-5], r"a\.idx: 117 bytes, expected 122 for 4 sequences and 4 doc"),
        (lambda data: data + b"xx", r"a\.idx: 124 bytes, expected 122"),
        (lambda data: data[:-8] + bytes(8), r"a\.idx: byte 82: document marks from 0 to 0, .* 4"),
    ],
)
def test_a_damaged_index_is_named_with_its_byte(tmp_path, change, said):
    write(tmp_path / "a")
    path = tmp_path / "a.idx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        MegatronIndex(path)


def test_modes_of_sequences_are_ignored(tmp_path):
    write(tmp_path / "a")
    path = tmp_path / "a.idx"
    path.write_bytes(path.read_bytes() + bytes(4))
    assert MegatronIndex(path).tokens == 12


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_files_are_equal_to_those_of_megatron_core(tmp_path, dtype):
    # Not a dependency: `pip install --no-deps megatron-core`. It passed with 0.16.1.
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 60_000, draw.integers(1, 300)) for _ in range(500)]
    for pieces in (1, 3):
        theirs, ours = tmp_path / f"theirs{pieces}", tmp_path / f"ours{pieces}"
        builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=np.dtype(dtype).type)
        with IndexWriter.open(ours, dtype) as writer:
            for first in range(0, len(documents), pieces):
                some = documents[first : first + pieces]
                builder.add_document(torch.from_numpy(np.concatenate(some)), [*map(len, some)])
                writer.add(*some)
        builder.finalize(f"{theirs}.idx")
        for suffix in ("bin", "idx"):
            name = f"ours{pieces}.{suffix}"
            assert (tmp_path / name).read_bytes() == theirs.with_suffix(f".{suffix}").read_bytes()
        read = megatron.IndexedDataset(str(ours))
        assert all(np.array_equal(read[i], documents[i]) for i in range(len(documents)))
