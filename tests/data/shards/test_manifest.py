import dataclasses
import json

import pytest

from ditty_di.data.shards.manifest import Manifest
from tests.data.shards.test_megatron import write


@pytest.fixture
def folder(tmp_path):
    shards = [write(tmp_path / "train-0"), write(tmp_path / "validation-0", split="validation")]
    Manifest("k", "t" * 64, 300, 0, 0.05, tuple(shards)).write(tmp_path)
    return tmp_path


def test_a_manifest_comes_back_equal(folder):
    manifest = Manifest.read(folder)
    text = (folder / "manifest.json").read_text()
    assert [*json.loads(text)] == [
        *("format", "key", "tokenizer", "vocab_size", "eos", "validation", "tokens", "shards")
    ]
    assert manifest.tokens == json.loads(text)["tokens"] == {"train": 12, "validation": 12}
    manifest.write(folder)
    assert (folder / "manifest.json").read_text() == text
    assert Manifest.read(folder) == manifest and manifest.check(folder) == []
    dataclasses.replace(manifest, shards=()).write(folder)
    assert Manifest.read(folder).shards == ()
    assert [shard.name for shard in manifest.of_split("train")] == ["train-0"]
    with pytest.raises(ValueError, match=r"no shards of the split 'test': there are \['train', 'v"):
        manifest.of_split("test")


def test_check_finds_files_that_are_missing_cut_or_changed(folder):
    manifest = Manifest.read(folder)
    path = folder / "train-0.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    assert "train-0.bin: SHA-256" in manifest.check(folder)[0]
    path.write_bytes(data[:-1])
    assert manifest.check(folder)[0].endswith("train-0.bin: 23 bytes, expected 24")
    path.unlink()
    (folder / "validation-0.idx").unlink()
    problems = manifest.check(folder)
    assert len(problems) == 2 and all("missing" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "manifest.json: not JSON"),
        ("[]", "manifest.json: format 'list', expected 'ditty_di shards 1'"),
        ('{"format": "x 2"}', "manifest.json: format 'x 2', expected"),
        ('{"format": "ditty_di shards 1"}', "manifest.json: damaged: 'tokens'"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        Manifest.read(tmp_path)


def test_a_manifest_that_contradicts_itself_or_the_run_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"train": 12', '"train": 13'))
    with pytest.raises(ValueError, match=r"'train': 13.* but its shards have .*'train': 12"):
        Manifest.read(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has no shards, or they are not finished"):
        Manifest.read(folder)
    manifest = Manifest("k", "t" * 64, 300, 0, 0.05, ())
    manifest.require_tokenizer("t" * 64, folder)
    with pytest.raises(ValueError, match=r"tokenizer tttttttttttt made these shards.*uuuuuuuuuuuu"):
        manifest.require_tokenizer("u" * 64, folder)
