import math
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from ditty_di.data import TokenDataset, python_docs, tokenize, train_bpe, unigram_entropy

DOCUMENTS = ["one two three one two", "x", "four <|endoftext|> five", "one two " * 300]


@pytest.fixture(scope="module")
def tokenizer(cache_dir):
    return train_bpe(DOCUMENTS, 300, 16, cache_dir)


def test_every_document_ends_with_eos(tokenizer, cache_dir, caplog):
    tokens = tokenize(DOCUMENTS, tokenizer, cache_dir, split_special_tokens=True)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    pieces = np.split(tokens, ends + 1)
    assert [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]] == DOCUMENTS
    assert len(pieces[-1]) == 0 and tokens.dtype == np.uint16
    warned = [record for record in caplog.records if record.levelname != "INFO"]
    assert not warned, "no warning about documents longer than the model's limit"


def test_special_tokens_in_a_document_are_special_by_default(tokenizer, cache_dir):
    tokens = tokenize(DOCUMENTS, tokenizer, cache_dir)
    assert (tokens == tokenizer.eos_token_id).sum() == len(DOCUMENTS) + 1


def test_tokens_are_mapped_and_cached_by_content(tokenizer, cache_dir, tmp_path):
    first = tokenize(DOCUMENTS, tokenizer, tmp_path)
    assert isinstance(first, np.memmap) and not first.flags.writeable
    tokenize(DOCUMENTS, train_bpe(DOCUMENTS, 300, 32, cache_dir), tmp_path)
    assert len(list(tmp_path.glob("tokens/*.npy"))) == 1, "the length limit changes no id"
    other = tokenize(DOCUMENTS, train_bpe(DOCUMENTS, 260, 16, cache_dir), tmp_path)
    assert len(other) > len(first)
    assert len(tokenize(DOCUMENTS[1:], tokenizer, tmp_path)) < len(first)


def test_a_large_vocabulary_gets_wider_ids(tokenizer, cache_dir):
    large = train_bpe(DOCUMENTS, 300, 16, cache_dir)
    large.add_tokens([f"<{i}>" for i in range(1 << 16)])
    tokens = tokenize(["<65535>"], large, cache_dir)
    assert tokens.dtype == np.uint32 and tokens.tolist() == [len(large) - 1, 0]


def test_what_cannot_be_tokenized(tokenizer, cache_dir):
    with pytest.raises(ValueError, match="split of the corpus is empty"):
        tokenize([], tokenizer, cache_dir)
    endless = train_bpe(DOCUMENTS, 300, 16, cache_dir)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        tokenize(DOCUMENTS, endless, cache_dir)


def _prepare(cache_dir, queue):
    tokenizer = train_bpe(DOCUMENTS, 300, 16, cache_dir)
    queue.put(tokenize(DOCUMENTS, tokenizer, cache_dir).tolist())


def test_several_processes_prepare_the_same_data_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_prepare, args=(tmp_path, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0] == results[1] == results[2] and len(results[0]) > 10
    left = [path.name for path in tmp_path.rglob(".*")]
    assert not [name for name in left if not name.endswith(".lock")]


@given(st.integers(2, 60), st.integers(1, 20))
def test_every_token_but_the_first_is_a_label_once(count, seq_len):
    tokens = np.arange(100, 100 + count, dtype=np.uint16)
    dataset = TokenDataset(tokens, seq_len)
    labels, inputs = [], []
    for i in range(len(dataset)):
        row, label = dataset[i]
        assert row.keys() == {"input"}
        assert row["input"].dtype == label.dtype == torch.int64
        assert row["input"].shape == label.shape == (seq_len,)
        valid = label != -100
        assert torch.equal(row["input"][valid] + 1, label[valid]), "shifted by one"
        labels += label[valid].tolist()
        inputs += row["input"][valid].tolist()
        assert (row["input"][~valid] == 0).all()
    assert labels == tokens[1:].tolist() and inputs == tokens[:-1].tolist()


def test_the_end_of_a_document_is_learnt(tokenizer, cache_dir):
    dataset = TokenDataset(tokenize(DOCUMENTS, tokenizer, cache_dir, True), 16)
    labels = torch.stack([dataset[i][1] for i in range(len(dataset))])
    assert (labels == tokenizer.eos_token_id).sum() == len(DOCUMENTS)


def test_rows_by_number():
    dataset = TokenDataset(np.arange(10), 4, pad_id=7, ignore_index=-1)
    assert dataset[np.int64(-1)][1].tolist() == [9, -1, -1, -1]
    assert dataset[2][0]["input"].tolist() == [8, 7, 7, 7]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            dataset[outside]
    assert len(list(dataset)) == 3, "iteration by index ends"


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens(count):
    with pytest.raises(ValueError, match=f"{count} tokens make no row"):
        TokenDataset(np.zeros(count, np.uint16), 8)
    with pytest.raises(ValueError, match="seq_len=0"):
        TokenDataset(np.zeros(9, np.uint16), 0)


def test_workers_that_are_not_forked_map_the_file_again(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(10_000, dtype=np.uint16))
    tokens = np.load(tmp_path / "t.npy", mmap_mode="r")
    whole, part = TokenDataset(tokens, 7), TokenDataset(tokens[5000:], 7)
    assert len(pickle.dumps(whole)) < 1000
    for dataset in (whole, part, TokenDataset(np.asarray(tokens), 7)):
        copy = pickle.loads(pickle.dumps(dataset))
        assert len(copy) == len(dataset)
        assert torch.equal(copy[3][1], dataset[3][1])


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200))
def test_unigram_entropy_is_the_best_loss_without_context(tokens):
    p = np.bincount(tokens, minlength=10) / len(tokens)
    logits = torch.tensor(p).log().expand(len(tokens), 10)
    best = cross_entropy(logits, torch.tensor(tokens)).item()
    assert math.isclose(unigram_entropy(np.array(tokens), 10), best, abs_tol=1e-9)


def test_unigram_entropy_of_the_embedded_corpus(cache_dir):
    corpus = python_docs(cache_dir)
    tokenizer = train_bpe(corpus.train, cache_dir=cache_dir)
    tokens = tokenize(corpus.validation, tokenizer, cache_dir)
    assert 5.5 < unigram_entropy(tokens, len(tokenizer)) < math.log(len(tokenizer))


def test_unigram_entropy_refuses_foreign_tokens():
    with pytest.raises(ValueError, match="token id 10 does not fit a vocabulary of 10"):
        unigram_entropy(np.array([1, 10]), 10)
    with pytest.raises(ValueError, match="no tokens"):
        unigram_entropy(np.array([], np.uint16), 10)
