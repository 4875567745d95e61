"""The content of datasets: rows replaced in place are noticed, random ones are not judged."""

import random

import numpy as np
import pytest
import torch

from ditty_di.data import (
    PackedDataset,
    Renderer,
    TokenizedDataset,
    TokenizedSeq2SeqDataset,
    in_memory,
)
from ditty_di.data.content import DataContent, array_digest, rows_digest
from ditty_di.data.reading.rows import Rows as Chosen
from tests.data.words import word_tokenizer


class Rows:
    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        torch.rand(1), np.random.rand(), random.random()
        return {"input": torch.tensor([len(self.texts[index])])}, self.texts[index]


class Loads:
    def __init__(self, dataset):
        self.dataset = dataset


APPLES = [f"apples {i}" for i in range(50)]


def test_a_row_replaced_in_place_is_refused_with_what_to_do():
    saved = DataContent(Loads(Rows(APPLES))).state_dict()
    DataContent(Loads(Rows(list(APPLES)))).load_state_dict(saved)
    for changed in (["plums! 0", *APPLES[1:]], [*APPLES[:-1], "x"], [a.upper() for a in APPLES]):
        with pytest.raises(ValueError, match=r"another content .*load.content=false goes on at"):
            DataContent(Loads(Rows(changed))).load_state_dict(saved)


def test_a_sample_of_rows_is_compared_with_as_large_a_sample():
    rows, digest = rows_digest(Rows(APPLES), sampled=7)
    assert rows == 7 and rows_digest(Rows(APPLES), sampled=7) == (7, digest)
    assert rows_digest(Rows(APPLES))[0] == 50


def test_random_rows_and_those_that_cannot_be_read_are_not_judged():
    class Random(Rows):
        def __getitem__(self, index):
            return np.random.default_rng().random()

    class Broken(Rows):
        def __getitem__(self, index):
            raise OSError("unreadable")

    for dataset in (Random(APPLES), Broken(APPLES)):
        assert rows_digest(dataset) is None
        assert DataContent(Loads(dataset)).state_dict() == {"content": {}}
    DataContent(object()).load_state_dict({"content": {"digest": "x"}})


def test_random_numbers_are_left_as_they_were():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    rows_digest(Rows(APPLES))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_the_digest_of_an_array_is_of_its_blocks_when_it_is_large():
    array = np.arange(10_000)
    digest = array_digest(array, block=1000, blocks=4)
    assert digest == array_digest(array.copy(), block=1000, blocks=4)
    array[-1] += 1
    assert digest != array_digest(array, block=1000, blocks=4)


def tokenized(folder, words):
    records = [{"input": "a b", "output": word} for word in words]
    return TokenizedDataset(in_memory(records), Renderer(word_tokenizer()), cache_dir=folder)


WRAPPERS = [
    lambda examples: PackedDataset(examples, 16),
    TokenizedSeq2SeqDataset,
    lambda examples: Chosen(examples, range(0, len(examples), 3)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_one_changed_example_is_noticed_through_what_is_made_of_the_examples(tmp_path, wrap):
    words = ["c"] * 300
    saved = DataContent(Loads(wrap(tokenized(tmp_path, words)))).state_dict()
    assert "rows" not in saved["content"], "all of the tokens are known, not a sample of rows"
    DataContent(Loads(wrap(tokenized(tmp_path, words)))).load_state_dict(saved)
    words[150] = "d"
    with pytest.raises(ValueError, match="another content"):
        DataContent(Loads(wrap(tokenized(tmp_path, words)))).load_state_dict(saved)


def test_rows_without_a_fingerprint_below_are_read(tmp_path):
    chosen = DataContent(Loads(Chosen(Rows(APPLES), range(7)))).state_dict()["content"]
    assert chosen["rows"] == 7 and chosen["digest"]


def test_a_checkpoint_with_a_sample_of_rows_is_compared_with_rows(tmp_path):
    examples = tokenized(tmp_path, ["c", "d", "e"])
    rows, digest = rows_digest(examples)
    content = DataContent(Loads(examples))
    content.load_state_dict({"content": {"rows": rows, "digest": digest}})
    with pytest.raises(ValueError, match="another content"):
        content.load_state_dict({"content": {"rows": rows, "digest": digest[::-1]}})
