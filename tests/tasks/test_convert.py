"""Folders of models in another layout: complete or absent, and in the memory of one file."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditty_di.models.deferred import Deferred
from ditty_di.tasks.convert import convert


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "any"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("left behind")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    return str(folder)


def test_no_more_than_one_file_is_in_memory(source, tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def fill(out, index):
        nonlocal most
        alive.append(weakref.ref(out))
        most = max(most, sum(one() is not None for one in alive))
        out.fill_(len(alive))

    def six(config, stored):
        tensors = {f"t{n}": Deferred((250,), torch.float32, fill) for n in range(6)}
        return {**config, "names": stored.names()}, tensors

    said = convert(source, str(tmp_path / "out"), six, max_shard_size="2KB")
    assert said == {"folder": str(tmp_path / "out"), "tensors": 6, "bytes": 6000}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) == 3 and most == 2
    for name, file in index["weight_map"].items():
        assert (load_file(tmp_path / "out" / file)[name] == int(name[1:]) + 1).all()
    written = {path.name for path in (tmp_path / "out").iterdir()} - files
    assert written == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["names"] == ["a"]


def test_a_file_that_cannot_be_read_leaves_no_folder(source, tmp_path):
    def broken(config, stored):
        def into(out, index):
            raise OSError("input/output error")

        return config, {"t": Deferred((2,), torch.float32, into)}

    with pytest.raises(OSError, match="input/output error"):
        convert(source, str(tmp_path / "out"), broken)
    assert not (tmp_path / "out").exists()
