"""What is read from a file, and what is said about one that cannot be read."""

import bz2
import gzip
import json
import lzma

import pytest

from ditty_di.data import records
from ditty_di.data.reading.files import read_values

TWO = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]


def lines(values, **options):
    return "".join(json.dumps(v, **options) + "\n" for v in values).encode()


def read(path, content):
    path.write_bytes(content)
    return list(read_values(path))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", lines(TWO), ["line 1", "line 2"]),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(TWO).replace(b"\n", b"\r\n\r\n"), ["line 1", "line 3"]),
        ("a.json", json.dumps(TWO).encode(), ["line 1, item 1", "line 1, item 2"]),
        ("a.jsonl", json.dumps(TWO, indent=1).encode(), ["line 2, item 1", "line 6, item 2"]),
        ("a.json", b"\xef\xbb\xbf\n" + json.dumps(TWO, indent=1).encode(), None),
        ("a.json", lines(TWO, indent=2), ["line 1", "line 5"]),
        ("a.json", lines(TWO).replace(b"\n", b" "), ["line 1", "line 1"]),
        ("no_suffix", lines(TWO), ["line 1", "line 2"]),
        ("a.jsonl.gz", gzip.compress(lines(TWO), mtime=0), ["line 1", "line 2"]),
        ("a.json.gz", gzip.compress(json.dumps(TWO).encode(), mtime=0), None),
        ("a.jsonl", gzip.compress(lines(TWO), mtime=0), ["line 1", "line 2"]),
        ("a.jsonl.bz2", bz2.compress(lines(TWO)), ["line 1", "line 2"]),
        ("a.jsonl.xz", lzma.compress(lines(TWO)), ["line 1", "line 2"]),
        ("a.csv", b"\xef\xbb\xbfinput,output\r\na,b\r\n\r\nc,d\r\n", ["line 2", "line 4"]),
        ("a.csv", b"input;output\na;b\nc;d\n", ["line 2", "line 3"]),
        ("a.csv", b",input,output\n0,a,b\n1,c,d\n", ["line 2", "line 3"]),
        ("a.tsv", b"input\toutput\na\tb\nc\td\n", ["line 2", "line 3"]),
        ("a.csv.gz", gzip.compress(b"input,output\na,b\nc,d\n", mtime=0), ["line 2", "line 3"]),
    ],
)
def test_records_are_read_however_they_are_written(tmp_path, name, content, where):
    found = read(tmp_path / name, content)
    assert [value for _, value in found] == TWO
    assert where is None or [at for at, _ in found] == where


def test_parquet_with_the_names_of_its_class_labels(tmp_path):
    import datasets

    features = {"a": datasets.Value("string"), "b": datasets.ClassLabel(names=["no", "yes"])}
    rows = datasets.Dataset.from_dict(
        {"a": ["x", "y", "z"], "b": [1, 0, -1]}, features=datasets.Features(features)
    )
    rows.to_parquet(str(tmp_path / "a.parquet"))
    found = list(records(tmp_path / "a.parquet", validation_fraction=0))
    assert [record for _, record in found] == [
        {"a": "x", "b": "yes"},
        {"a": "y", "b": "no"},
        {"a": "z", "b": None},
    ]
    assert found[1][0] == f"{tmp_path / 'a.parquet'}, row 2"


def test_text_that_breaks_lines_stays_in_its_field(tmp_path):
    texts = ["x\u2028y\x85z\x0b", 'a "quoted"\nline, and more']
    assert [
        v["t"] for _, v in read(tmp_path / "a.jsonl", lines([{"t": t} for t in texts]))
    ] == texts
    csv = b't\n"a ""quoted""\nline, and more"\nb\n'
    assert read(tmp_path / "a.csv", csv) == [("line 2", {"t": texts[1]}), ("line 4", {"t": "b"})]


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', "line 3", "no comma between two items"),
        (b'[\n{"a": 1},\n]', "line 3", "a comma in front of the list's end"),
        (b'[\n{"a": 1},\n{"a": 2}', "line 3", "a ']' is missing"),
        (b'[\n{"a": 1}\n]\n{"a": 2}\n', "line 4", "text after the end of the list"),
        (b'{\n "a": 1\n "b": 2\n}\n', "line 3", "Expecting ',' delimiter"),
        (b'[\n {"a": NaN}\n]', "line 1", "NaN is not a JSON value: write null"),
        (b'[\n{"a": "\xe9"},\n{"a": "\xe9"}]', "line 2", "invalid continuation byte"),
    ],
)
def test_a_damaged_list_is_one_mistake_with_its_line(tmp_path, content, where, what):
    *_, (at, error) = read(tmp_path / "a.json", content)
    assert isinstance(error, ValueError) and what in str(error) and at == where
    assert sum(isinstance(v, ValueError) for _, v in read_values(tmp_path / "a.json")) == 1


def test_damaged_lines_are_told_one_by_one(tmp_path):
    found = read(tmp_path / "a.jsonl", b'{"a": \n{"a": 1}\n{"a": Infinity}\n[1]\n')
    assert [at for at, v in found if isinstance(v, ValueError)] == ["line 1", "line 3"]
    assert [v for _, v in found if not isinstance(v, ValueError)] == [{"a": 1}, [1]]
    table = read(tmp_path / "a.csv", b"a,b\n1\n2,3\n")
    assert "1 fields, where the header has 2" in str(table[0][1]) and table[1][1]["b"] == "3"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.xlsx", b"PK\x03\x04...", "is a zip archive"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd...", "cannot be decompressed"),
        ("a.parquet", b"not at all", "is not a Parquet file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.txt", b"Once upon a time", r"it begins with 'Once upon.*data=text data.corpus.path"),
        ("a.jsonl.gz", gzip.compress(lines(TWO * 500), mtime=0)[:60], "cannot be decompressed"),
        ("a.csv", b"a,a\n1,2\n", "names a column twice"),
        ("a.csv", b'a,b\n"1"2,3\n', "cannot be read"),
        ("a.csv", "a\né\n".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(tmp_path, name, content, what):
    with pytest.raises(ValueError, match=what) as error:
        read(tmp_path / name, content)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
