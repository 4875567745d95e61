"""Files in object stores: which there are, their bytes, and what is said when there is a fault."""

import gzip
import pickle
import random
import sys

import fsspec
import pytest

from ditty_di.data.reading.files import opened
from ditty_di.data.reading.remote import RemoteFile, fetched_folder, is_url, listed, upload

CONTENT = bytes(random.Random(0).randbytes(100_000))


def write(url, content=CONTENT):
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, content)
    return url


def test_what_a_url_is():
    assert is_url("s3://bucket/a") and is_url("memory://a") and is_url("file:///tmp")
    assert not any(map(is_url, ("C:\\a", "a/b", "/s3://", "user/name", None, ["s3://a"])))


def test_a_file_a_folder_and_a_pattern_are_listed(s3):
    for name in ("a.txt", "b/c.txt", "b/d.jsonl", "b/e/f.txt"):
        write(f"{s3}/data/{name}", b"text")
    write(f"{s3}/database.txt")
    assert [*listed(f"{s3}/data/b/c.txt")] == ["c.txt"]
    assert [*listed(f"{s3}/data")] == ["a.txt", "b/c.txt", "b/d.jsonl", "b/e/f.txt"]
    assert [*listed(f"{s3}/data/")] == [*listed(f"{s3}/data")]
    assert [*listed(f"{s3}/data", ["**/*.jsonl", "*.txt"])] == ["a.txt", "b/d.jsonl"]
    assert [*listed(f"{s3}/data/*/*.txt")] == ["b/c.txt"]
    found = listed(f"{s3}/data/**/*.txt")
    assert [*found] == ["a.txt", "b/c.txt", "b/e/f.txt"]
    assert {str(file): file.size for file in found.values()} == {
        f"{s3}/data/{name}": 4 for name in found
    }
    assert listed(f"{s3}/nothing") == {}


def test_a_changed_file_has_another_key(s3):
    before = RemoteFile.find(write(f"{s3}/a", b"one"))
    again = RemoteFile.find(write(f"{s3}/a", b"one"))
    after = RemoteFile.find(write(f"{s3}/a", b"two"))
    assert before.key == again.key != after.key


def test_any_range_is_read_where_it_is(s3):
    file = pickle.loads(pickle.dumps(RemoteFile.find(write(f"{s3}/a.bin"))))
    draw = random.Random(1)
    with file.open() as stream:
        for _ in range(50):
            start, size = draw.randrange(len(CONTENT)), draw.randrange(20_000)
            stream.seek(start)
            assert stream.read(size) == CONTENT[start : start + size]
    assert file.read_bytes() == CONTENT
    lines = b"".join(b"%d\n" % i for i in range(50_000))
    with opened(RemoteFile.find(write(f"{s3}/a.gz", gzip.compress(lines)))) as stream:
        assert b"".join(stream) == lines


def test_a_folder_is_fetched_once(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path))
    write(f"{s3}/t/a.json", b"1")
    write(f"{s3}/t/b/c.json", b"2")
    folder = fetched_folder(f"{s3}/t")
    assert (folder / "a.json").read_bytes() == b"1" and (folder / "b/c.json").read_bytes() == b"2"
    assert fetched_folder(f"{s3}/t") == folder
    write(f"{s3}/t/a.json", b"3")
    assert (fetched_folder(f"{s3}/t") / "a.json").read_bytes() == b"3"
    assert fetched_folder(f"{s3}/u") is None


def test_an_upload_goes_on_and_writes_its_last_file_last(s3, tmp_path):
    names = ["a.bin", "t/b.json", "z.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert upload(tmp_path, f"{s3}/up", names) == 3
    assert {n: f.read_bytes().decode() for n, f in listed(f"{s3}/up").items()} == dict(
        zip(names, names, strict=True)
    )
    (tmp_path / "a.bin").write_text("longer")
    (tmp_path / "z.json").write_text("json.z")
    assert upload(tmp_path, f"{s3}/up", names) == 2
    assert [f.read_bytes() for f in listed(f"{s3}/up").values()] == [
        b"longer",
        b"t/b.json",
        b"json.z",
    ]


READS = [lambda file: file.read_bytes(), lambda file: file.open().read()]


@pytest.mark.parametrize("read", READS)
def test_a_protocol_without_its_package_says_what_to_install(read, monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"^s3://b/a: .* pip install 'ditty_di\[s3\]'$"):
        read(RemoteFile("s3://b/a", 5))
    with pytest.raises(ValueError, match=r"^nonsense://a: fsspec knows no protocol 'nonsense'"):
        read(RemoteFile("nonsense://a", 5))


@pytest.mark.parametrize("read", READS)
def test_a_file_that_is_not_there_is_named(s3, read):
    with pytest.raises(FileNotFoundError, match=rf"^{s3}/none: there is no such file"):
        read(RemoteFile(f"{s3}/none", 5))


def test_a_store_that_does_not_answer_is_named(s3, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConnectionError, match=rf"^{s3}/a cannot be reached: Could not connect"):
        RemoteFile(f"{s3}/a", 5).read_bytes()
    s3fs.S3FileSystem.clear_instance_cache()
