"""Text in an object store, and shards that are copied to one."""

import gzip
import json
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from ditty_di.data import Shards
from ditty_di.data.reading.remote import RemoteFile, listed, upload
from ditty_di.data.shards import Manifest
from ditty_di.data.tokenization import Pool, TextFiles
from ditty_di.models.auto import tokenizer as auto_tokenizer
from ditty_di.tasks.download import download
from ditty_di.tasks.tokenize import tokenize
from tests.data.tokenization.conftest import content

SMALL = {"part_mb": 0.005, "report_mb": 0, "patience": 0}
ALONE = Pool(workers=1, rank=0, world=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    """Documents in files of many kinds, some of which are cut into parts."""
    folder = tmp_path_factory.mktemp("kinds")
    lines = [json.dumps({"text": text}) + "\n" for text in texts[:90]]
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[::-1]).encode()))
    with pa.CompressedOutputStream(str(folder / "c.jsonl.zst"), "zstd") as stream:
        stream.write("".join(lines[1::2]).encode())
    (folder / "deep").mkdir()
    parquet.write_table(
        pa.table({"text": texts[90:150]}), folder / "deep" / "d.parquet", row_group_size=7
    )
    (folder / "deep" / "e.txt").write_text("\n".join(texts[150:]))
    (folder / "deep" / "left_out.md").write_text("no text")
    return folder


def copy(folder, url):
    upload(folder, url, [p.relative_to(folder).as_posix() for p in folder.rglob("*.*")])
    return url


@pytest.mark.parametrize("downloaded", [False, True])
def test_remote_text_gives_the_same_bytes_as_on_disk(folder, s3, tokenizer, tmp_path, downloaded):
    found = []
    for path in (str(folder), copy(folder, f"{s3}/text")):
        source = TextFiles(path, documents="line")
        if downloaded:
            source.download()
        shards = tmp_path / f"shards{len(found)}"
        tokenize(tokenizer, str(shards), source, engine=ALONE, **SMALL)
        found.append(content(shards))
    assert found[0] == found[1]
    assert Manifest.read(shards).tokens["train"] > 1000
    local = {type(file.path) is not RemoteFile for file in source.files()}
    assert local == {downloaded}


def test_a_download_brings_what_is_missing_and_what_has_changed(folder, s3, capsys):
    url = copy(folder, f"{s3}/text")
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    source = TextFiles(f"{url}/*.jsonl*")
    assert download(source)["text"]["files"] == 3
    assert "text: 3 files, " in capsys.readouterr().out
    first = [file.path.read_bytes() for file in source.files()]
    assert first == [fs.cat_file(f"{url}/{file.name}") for file in source.files()]
    fs.pipe_file(f"{url}/a.jsonl", b'{"text": "other"}\n')
    assert type(source.files()[0].path) is RemoteFile
    download(source)
    assert source.files()[0].path.read_bytes() == b'{"text": "other"}\n'


def test_a_fault_of_the_store_is_no_bad_document(folder, s3, tokenizer, tmp_path):
    url = copy(folder, f"{s3}/text")
    files = TextFiles(url).files()
    fsspec.filesystem("s3", use_listings_cache=False).rm(url, recursive=True)
    for file in (file for file in files if file.name.endswith((".jsonl", ".parquet"))):
        source = SimpleNamespace(files=lambda f=file: [f], text_key="text", documents="file")
        with pytest.raises(FileNotFoundError, match=rf"^{url}/\S+: there is no such file"):
            tokenize(
                tokenizer,
                str(tmp_path / file.path.name),
                source,
                engine=ALONE,
                on_error="skip",
                **SMALL,
            )


def test_bad_lines_are_named_with_their_url_and_byte(s3, tokenizer, tmp_path):
    fsspec.filesystem("s3").pipe_file(f"{s3}/bad.jsonl", b'{"text": "one"}\n{"text": \n')
    with pytest.raises(ValueError, match=rf"^{s3}/bad.jsonl: byte 24: not JSON"):
        tokenize(tokenizer, str(tmp_path / "s"), TextFiles(f"{s3}/bad.jsonl"), engine=ALONE)
    with pytest.raises(FileNotFoundError, match=rf"no text at path={s3}/none"):
        TextFiles(f"{s3}/none").files()


def test_shards_are_copied_with_their_tokenizer_and_trained_on_there(
    folder, s3, tokenizer, tmp_path
):
    sources = {"web": TextFiles(folder / "a.jsonl"), "code": TextFiles(folder / "deep")}
    settings = {"engine": ALONE, "upload": f"{s3}/shards/", **SMALL}
    tokenize(tokenizer, str(tmp_path / "shards"), sources=sources, **settings)
    copies = listed(f"{s3}/shards/web")
    assert "manifest.json" in copies and "tokenizer/tokenizer.json" in copies
    found = auto_tokenizer(shards=f"{s3}/shards/web")
    assert len(found) == len(auto_tokenizer(shards=f"{s3}/shards")) == len(tokenizer)
    remote = Shards(f"{s3}/shards/web", 16, tokenizer=found)
    local = Shards(tmp_path / "shards" / "web", 16)
    assert [row[1].tolist() for row in remote] == [row[1].tolist() for row in local]
    with pytest.raises(ValueError, match=r"task.upload=s3://b/shards"):
        tokenize(tokenizer, "s3://b/shards", sources["web"])
    with pytest.raises(ValueError, match="upload='shards': write the URL of a folder"):
        tokenize(tokenizer, "shards", sources["web"], upload="shards")
