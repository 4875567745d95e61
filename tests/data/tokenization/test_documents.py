"""Documents of files: each once whatever the cuts, and every fault with its file and byte."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ditty_di.data.tokenization.documents import DocumentError, Reading
from ditty_di.data.tokenization.plan import plan
from ditty_di.data.tokenization.sources import TextFiles

LINES = st.lists(st.sampled_from(["", "  ", "a", "b c", "\tdé", "e" * 20]), min_size=1, max_size=20)


def read(file, *args, **options):
    """Texts, and the messages of errors."""
    found = Reading(**options).read(file, *args)
    return [str(f) if isinstance(f, DocumentError) else f.text for f in found]


def by_parts(file, part_bytes, **options):
    reading = Reading(**options)
    parts = plan(TextFiles(file).files(), reading, part_bytes)
    segments = [segment for part in parts for segment in part.segments]
    return [text for s in segments for text in read(s.path, s.start, s.stop, **options)]


@settings(deadline=None, max_examples=60)
@given(LINES, st.sampled_from(["", "\n"]), st.sampled_from([1, 2, 5, 17]))
def test_cuts_of_a_text_file_lose_and_repeat_nothing(tmp_path_factory, lines, end, part_bytes):
    file = tmp_path_factory.mktemp("cut") / "a.txt"
    file.write_bytes(("\n".join(lines) + end).encode() or b"\n")
    wanted = [line for line in lines if line.strip()]
    assert by_parts(file, part_bytes, documents="line") == wanted
    marked = "\n".join(line if line.strip() else "\0" for line in lines)
    paragraphs = [p.strip("\n") for p in re.split("\0", marked)]
    assert by_parts(file, part_bytes, documents="paragraph") == [p for p in paragraphs if p]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.sampled_from([1, 9, 40]))
def test_cuts_of_json_lines_lose_and_repeat_nothing(tmp_path_factory, texts, part_bytes):
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert by_parts(file, part_bytes) == [text for text in texts if text.strip()]


def test_row_groups_of_parquet_lose_and_repeat_nothing(tmp_path):
    texts = [f"text {i}" * (i % 5 + 1) for i in range(50)]
    parquet.write_table(
        pa.table({"n": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=7
    )
    assert by_parts(tmp_path / "a.parquet", 100) == texts
    assert len(plan(TextFiles(tmp_path / "a.parquet").files(), Reading(), 100)) > 2


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstd])
def test_every_format_gives_the_same_documents(tmp_path, pack):
    texts = ["one", "two\nlines", "thrée"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    table = "text,n\r\n" + "".join(f'"{text}",1\r\n' for text in texts)
    (tmp_path / "a.jsonl").write_bytes(pack(lines.encode()))
    (tmp_path / "a.json").write_bytes(pack(json.dumps([{"text": t} for t in texts]).encode()))
    (tmp_path / "a.csv").write_bytes(pack(table.encode()))
    (tmp_path / "a.txt").write_bytes(pack("\n\n".join(t.replace("\n", "") for t in texts).encode()))
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert read(tmp_path / name) == texts, name
    assert read(tmp_path / "a.txt", documents="paragraph") == ["one", "twolines", "thrée"]
    assert read(tmp_path / "a.txt") == ["one\n\ntwolines\n\nthrée"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "byte 26: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "byte 24: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'byte 14: no key "text"'),
        ("a.jsonl", b'{"text": null}\n', 'byte 0: "text" holds a NoneType'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "byte 0: .*half of a surrogate pair"),
        ("a.txt", b"good\n\xff\n", "byte 5: not UTF-8 text"),
        ("a.txt", "text".encode("utf-16"), "byte 0: UTF-16 text: save it as UTF-8"),
        ("a.txt", b"", "byte 0: the file is empty"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], "byte .*cannot be decompr"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}\n' * 999)[:-3], "byte .*cannot be decompr"),
        ("a.parquet", b"PAR1 not really", "not a Parquet file"),
        ("a.csv", b"txt\nb\n", 'line 2: no key "text"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_told_with_its_file_and_byte(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    options = {"documents": "line"} if name == "a.txt" else {}
    found = Reading(**options).read(tmp_path / name)
    errors = [f for f in found if isinstance(f, DocumentError)]
    assert len(errors) == 1
    assert re.search(f"{re.escape(str(tmp_path / name))}: {message}", str(errors[0]))


def test_rows_of_parquet_are_told_by_their_number(tmp_path):
    table = pa.table({"text": ["a", None, "c", "d"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    found = read(tmp_path / "a.parquet", 1, 3)
    assert found[1:] == ["c"] and "row 2: " in found[0]
    (missing,) = read(tmp_path / "a.parquet", text_key="content")
    assert "no key \"content\" among ['text']" in missing


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("text", ["wörds here\n" * 99, "no-line" * 99, "🙂" * 99])
def test_a_long_document_comes_in_pieces_or_is_refused(tmp_path, name, text):
    content = json.dumps({"text": text}) if name == "a.jsonl" else text
    (tmp_path / name).write_text(content)
    reading = Reading(max_document_mb=200 / 2**20)
    pieces = [*reading.read(tmp_path / name)]
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.data) for piece in pieces) <= 200
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    if "\n" in text:
        assert all(piece.text.endswith("\n") for piece in pieces)
    (refused,) = read(tmp_path / name, max_document_mb=200 / 2**20, long_documents="error")
    assert "byte 0: a document" in refused and "max_document_mb" in refused


ESCAPED = st.lists(
    st.sampled_from(
        [
            "a",
            "é",
            "数",
            "🙂",
            "\n",
            "\t",
            '"',
            "\\",
            "\\u",
            "\\ud83d",
            "u",
            "\x00",
            "\ud7ff",
            " " * 9,
        ]
    ),
    max_size=60,
).map("".join)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ESCAPED, ESCAPED, st.booleans(), st.integers(13, 40))
def test_a_long_string_of_json_is_read_in_pieces(monkeypatch, tmp_path, text, other, ascii_, size):
    """Whatever is escaped where the pieces meet, the document is what json makes of it."""
    monkeypatch.setattr("ditty_di.data.tokenization.long_documents.LONG_STRING", size)
    monkeypatch.setattr("ditty_di.data.tokenization.documents.LONG_STRING", size)
    record = {other: 1, "meta": {"text": other}, "text": text, "list": [other, None]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record, ensure_ascii=ascii_) + "\n")
    assert read(tmp_path / "a.jsonl") == ([text] if text.strip() else [])
    cut = [*Reading(max_document_mb=64 / 2**20).read(tmp_path / "a.jsonl")]
    assert "".join(piece.text for piece in cut) == (text if text.strip() else "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "%b\\x"}', "byte 3: a string that is no text .* Invalid"),
        (b'{"text": "%b\xff"}', "byte 3: a string that is no text .* invalid start byte"),
        (b'{"text": "%b\\ud83d"}', "byte 3: a string that is no text .* surrogates not allowed"),
        (b'{"text": "%b", }', "byte 3: not JSON"),
        (b'{"txt": "%b"}', 'byte 3: no key "text"'),
        (b'{"text": ["%b"]}', 'byte 3: "text" holds a list'),
    ],
)
def test_a_fault_in_a_long_line_is_told(monkeypatch, tmp_path, line, message):
    monkeypatch.setattr("ditty_di.data.tokenization.long_documents.LONG_STRING", 50)
    monkeypatch.setattr("ditty_di.data.tokenization.documents.LONG_STRING", 50)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + line % (b"word " * 40) + b'\n{"text": "b"}\n')
    _, fault, last = read(tmp_path / "a.jsonl")
    assert re.search(message, fault) and last == "b"


MEMORY = """
import sys
from pathlib import Path
from ditty_di.data.tokenization.documents import Reading
read = Reading(documents="line").read(Path(sys.argv[1]))
size = sum(len(piece.data) for piece in read)
peak = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
print(size, int(peak.split()[1]) // 1000)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_of_100_mb_is_read_in_little_memory(tmp_path, name):
    # One wide character: decoded as a whole, each letter would take four bytes.
    text = "🙂" + "some words " * 9_090_000
    content = json.dumps({"text": text}, ensure_ascii=False) if name == "a.jsonl" else text
    (tmp_path / name).write_text(content + "\n")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    size, peak = map(int, done.stdout.split())
    assert size == len(text.encode())
    assert peak < 340  # MB, and encoding takes some 150


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("ditty_di.data.tokenization.documents.MAX_LINE", 100)
    (tmp_path / "a.txt").write_text("short\n" + "x" * 270 + "\nlast\n")
    first, refused, last = read(tmp_path / "a.txt", documents="line", max_document_mb=80 / 2**20)
    assert (first, last) == ("short", "last")
    assert "byte 6: a line of 271 bytes" in refused
