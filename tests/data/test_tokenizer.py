import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from ditty_di.data import python_docs, train_bpe
from ditty_di.data.tokenizer import tokenizer_fingerprint

DOCUMENTS = ["Hello world, this is some text. " * 3, "def f(x):\n\treturn x  # ünïcödé 🙂"]


@pytest.fixture(scope="module")
def tokenizer(cache_dir):
    return train_bpe(DOCUMENTS, 400, 64, cache_dir)


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(["<|pad|>", "<|endoftext|>", " ", "'s", "a"])))
def test_any_text_decodes_to_itself(tokenizer, parts):
    text = "".join(parts)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    split = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(split) == text and not {0, 1} & set(split)


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.pad_token_id == 1, "padding must not look like the end of a document"
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_a_small_corpus_gives_fewer_entries(tokenizer, cache_dir):
    assert 258 < len(tokenizer) < 400
    assert len(train_bpe(["a"], cache_dir=cache_dir)) == 258


def test_a_large_corpus_fills_the_vocabulary(cache_dir):
    tokenizer = train_bpe(python_docs(cache_dir).train, cache_dir=cache_dir)
    assert len(tokenizer) == 2048
    assert len(tokenizer("the standard library")["input_ids"]) <= 6


def test_the_same_documents_give_the_same_tokenizer(cache_dir, tmp_path):
    documents = python_docs(cache_dir).validation
    again = train_bpe(documents, 1000, cache_dir=tmp_path)
    assert again.get_vocab() == train_bpe(documents, 1000, cache_dir=cache_dir).get_vocab()
    other = train_bpe(documents[1:], 1000, cache_dir=tmp_path)
    assert other.get_vocab() != again.get_vocab(), "cached by content"
    assert len(list((tmp_path / "tokenizers").glob("bpe-*[!k]"))) == 2


def test_what_identifies_a_tokenizer_does_not_depend_on_its_last_call(tokenizer):
    """Else data are tokenized twice, and shards refuse their own tokenizer."""
    tokenizer("a b")
    known = tokenizer_fingerprint(tokenizer)
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding="max_length")
    limits = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    assert tokenizer_fingerprint(tokenizer) == known
    backend = tokenizer.backend_tokenizer
    assert (backend.truncation, backend.padding) == limits and None not in limits


def test_the_length_limit_is_the_callers(tokenizer, cache_dir):
    assert tokenizer.model_max_length == 64
    assert train_bpe(DOCUMENTS, 400, 32, cache_dir).model_max_length == 32
    assert train_bpe(DOCUMENTS, 400, cache_dir=cache_dir).model_max_length > 10**6


def test_auto_tokenizer_opens_it_beside_a_llama(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    text = "  Hello <|endoftext|> wörld\n\n\tagain"
    assert stock(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert stock.decode(stock(text)["input_ids"]) == text
    assert (stock.eos_token_id, stock.pad_token_id, stock.model_max_length) == (0, 1, 64)


def test_bad_arguments(cache_dir):
    with pytest.raises(ValueError, match="training split is empty"):
        train_bpe([], cache_dir=cache_dir)
    with pytest.raises(ValueError, match="at least 258"):
        train_bpe(["a"], 257, cache_dir=cache_dir)
