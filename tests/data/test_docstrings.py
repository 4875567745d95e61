import ast
import json

import pytest

from ditty_di.data import docstring_pairs, held_out_module


@pytest.fixture(scope="module")
def splits(cache_dir):
    folder = docstring_pairs(cache_dir=cache_dir)
    return {
        path.name: [json.loads(line) for file in path.glob("*.jsonl") for line in file.open()]
        for path in folder.iterdir()
    }


def test_enough_pairs_in_every_split(splits):
    assert splits.keys() == {"train", "val", "test"}
    assert len(splits["train"]) > 2500
    assert min(len(splits["val"]), len(splits["test"])) > 100
    assert max(len(pair["input"]) for pair in splits["train"]) < 1300


def test_what_is_held_out_comes_from_modules_of_its_own(splits):
    modules = {name: {pair["module"] for pair in pairs} for name, pairs in splits.items()}
    assert not any(map(held_out_module, modules["train"]))
    assert all(map(held_out_module, modules["val"] | modules["test"]))
    assert not modules["val"] & modules["test"]


def test_nothing_comes_twice(splits):
    pairs = [pair for split in splits.values() for pair in split]
    for key in ("input", "output"):
        assert len({pair[key] for pair in pairs}) == len(pairs)


def test_the_answer_is_not_in_the_question(splits):
    """Sources are whole functions, without the docstring whose first line is to be found."""
    for pair in [pair for split in splits.values() for pair in split]:
        source = pair["input"].removesuffix("\n\n# Summary:")
        assert source != pair["input"]
        (function,) = ast.parse(source).body
        assert function.name == pair["name"] and pair["output"].startswith(" ")
        assert pair["output"].strip() not in (ast.get_docstring(function) or "")


def test_built_once_by_python_and_length(cache_dir, tmp_path):
    short = docstring_pairs(200, cache_dir=tmp_path)
    assert docstring_pairs(200, cache_dir=tmp_path) == short
    lines = (short / "train" / "functions.jsonl").read_text().splitlines()
    assert 200 < len(lines) < 2500


def test_the_held_out_modules_never_change():
    """A base that was pretrained without them must not meet them later."""
    some = ["abc", "json", "json.decoder", "queue", "inspect", "argparse", "logging", "os", "re"]
    assert [name for name in some if held_out_module(name)] == HELD_OUT


HELD_OUT = ["json", "queue", "inspect", "logging"]
