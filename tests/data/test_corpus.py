import json
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditty_di.data import python_docs, text_files
from ditty_di.data.reading.corpus import _cut, split_documents


def normalized(text):
    return " ".join(text.split())


def test_python_docs_hold_the_language_reference_and_docstrings(cache_dir):
    corpus = python_docs(cache_dir)
    documents = [*corpus.train, *corpus.validation]
    assert len(documents) > 3000 and sum(map(len, documents)) > 1_000_000
    assert 0.03 < len(corpus.validation) / len(documents) < 0.07
    everything = "\n".join(documents)
    assert "Assert statements are a convenient way" in everything
    assert "def json.dumps(obj, *, skipkeys=False" in everything
    assert "class collections.Counter(dict)\n\nDict subclass for counting" in everything
    assert "antigravity" not in sys.modules, "sources are parsed, not imported"
    headers = {document.split("\n", 1)[0] for document in documents}
    strangers = ("def test.", "def unittest.test.", "def pip.", "def pytest.", "def torch.")
    assert not [header for header in headers if header.startswith(strangers)]


def test_python_docs_have_no_text_twice_and_none_on_both_sides(cache_dir):
    corpus = python_docs(cache_dir)
    bodies = [normalized(d.split("\n\n", 1)[-1]) for d in [*corpus.train, *corpus.validation]]
    assert len(set(bodies)) > 0.999 * len(bodies)  # a topic's first paragraph is no header
    assert not set(map(normalized, corpus.train)) & set(map(normalized, corpus.validation))
    assert min(map(len, corpus.train)) >= 40


def test_python_docs_are_the_same_however_often_they_are_built(cache_dir, tmp_path):
    assert python_docs(tmp_path) == python_docs(cache_dir)


def test_a_damaged_cache_is_named(cache_dir, tmp_path):
    python_docs(cache_dir)
    shutil.copytree(cache_dir / "corpora", tmp_path / "corpora")
    (cached,) = (tmp_path / "corpora").glob("*.json")
    cached.write_text("{")
    with pytest.raises(ValueError, match=r"python-docs.*\.json is damaged .*delete it"):
        python_docs(tmp_path)


@given(st.sets(st.text("abc", min_size=1), min_size=2, max_size=30), st.sampled_from([0.05, 0.9]))
def test_neither_side_of_a_split_is_empty(texts, fraction):
    corpus = split_documents([(text, text) for text in sorted(texts)], fraction)
    assert corpus.train and corpus.validation
    assert sorted(corpus.train + corpus.validation) == sorted(texts)


def test_more_documents_move_none_to_the_other_side():
    documents = [(f"document {i}",) * 2 for i in range(1000)]
    few, many = (split_documents(some, 0.05) for some in (documents[:500], documents))
    assert set(few.train) < set(many.train) and set(few.validation) < set(many.validation)


@given(st.text(min_size=1).filter(str.strip))
def test_a_single_document_is_cut_without_loss(text):
    corpus = _cut(text, 0.05)
    assert "".join(corpus.train + corpus.validation) == text.strip()
    assert bool(corpus.validation) == (len(text.strip()) > 1)


def test_a_single_file_is_cut_at_a_line(tmp_path):
    lines = [f"line {i} of a play\n" for i in range(200)]
    (tmp_path / "play.txt").write_text("".join(lines))
    corpus = text_files(tmp_path / "play.txt")
    assert corpus.train[0].endswith("of a play") and corpus.validation[0].startswith("\nline")
    assert 0.03 < len(corpus.validation[0]) / sum(map(len, lines)) < 0.07


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third\n\nstill third\n")
    (tmp_path / "a.JSONL").write_text('\ufeff{"text": "first"}\n\n{"text": "second\u2028x"}\n')
    (tmp_path / "ignored.md").write_text("no")
    (tmp_path / "empty.txt").write_text(" \n")
    corpus = text_files(tmp_path, validation_fraction=0)
    assert corpus.train == ["first", "second\u2028x", "third\n\nstill third"]
    assert corpus.validation == []


def test_lines_as_documents_and_duplicates(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("über\r\n\r\n  b\r\n b \r\nc".encode())
    read = {"split_lines": True, "validation_fraction": 0.0}
    assert text_files(path, **read).train == ["über", "  b", "c"]
    assert text_files(path, deduplicate=False, **read).train == ["über", "  b", " b ", "c"]


def test_own_validation_files_share_nothing_with_the_training_files(tmp_path):
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "held_out.txt").write_text(" b\nc\n")
    paths = {"path": tmp_path / "train.txt", "split_lines": True}
    corpus = text_files(validation_path=tmp_path / "held_out.txt", **paths)
    assert (corpus.train, corpus.validation) == (["a", "b"], ["c"])
    (tmp_path / "held_out.txt").write_text("b\n")
    with pytest.raises(ValueError, match="also in"):
        text_files(validation_path=tmp_path / "held_out.txt", **paths)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "delimiter"),
        ("[1]", "a JSON list instead of an object"),
        ('{"txt": "a", "id": 1}', r"no key \"text\" among \['id', 'txt'\]"),
        ('{"text": null}', "holds a NoneType instead of text"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "some.jsonl"
    path.write_text(f"{json.dumps({'text': 'good'})}\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"some\.jsonl:3: .*{reason}.*text_key"):
        text_files(path)


def test_another_text_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    assert text_files(tmp_path, text_key="body").train == ["x"]


def test_files_are_looked_for_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    text_files.validate(path=str(tmp_path / "a.txt"), validation_path=tmp_path)
    text_files.validate(path=object())
    for options in ({"path": "gone.txt"}, {"path": str(tmp_path), "validation_path": "gone"}):
        with pytest.raises(ValueError, match=r"path='gone.*': no corpus at"):
            text_files.validate(**options)
    with pytest.raises(ValueError, match=r"^path='a.csv': no corpus at"):
        text_files.validate(path="a.csv")


def test_texts_in_lists_and_compressed_files(tmp_path):
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\ufeffthree".encode()))
    (tmp_path / "about.json").write_text('{"license": "mit"}')
    whole = text_files(tmp_path, validation_fraction=0)
    assert whole.train == ["one", "two", "three"]
    (tmp_path / "c.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert text_files(tmp_path / "c.json", validation_fraction=0).train == ["one", "two"]


def test_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no documents in .*: looked for .* 0 \.txt and \.jsonl"):
        text_files(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"no documents in .*empty\.txt.*\(1 bytes\)"):
        text_files(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match=r"no corpus at .*missing"):
        text_files(tmp_path / "missing")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"a\.csv: expected a \.txt or \.jsonl"):
        text_files(tmp_path / "a.csv")
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        text_files(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="validation_fraction=1"):
        text_files(tmp_path, validation_fraction=1)
