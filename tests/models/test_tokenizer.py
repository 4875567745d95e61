"""The tokenizer of a pretrained model."""

import pytest

from ditty_di.data import train_bpe
from ditty_di.models.tokenizer import from_pretrained


@pytest.fixture
def folder(tmp_path):
    made = train_bpe(["some words to learn pairs from"] * 3, vocab_size=260, cache_dir=tmp_path)
    made.save_pretrained(tmp_path / "there")
    return tmp_path / "there"


def test_new_special_tokens_are_one_id_each_and_known_ones_stay(folder):
    plain = from_pretrained(str(folder))
    grown = from_pretrained(str(folder), special_tokens=["<|user|>", plain.pad_token])
    assert len(grown) == len(plain) + 1
    assert grown("<|user|>some")["input_ids"] == [len(plain), *plain("some")["input_ids"]]
    assert grown.decode([len(plain)], skip_special_tokens=True) == ""
    assert (grown.eos_token_id, grown.pad_token_id) == (plain.eos_token_id, plain.pad_token_id)


def test_a_chat_template_comes_as_text_or_file(folder, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    for given in (template, str(tmp_path / "template.jinja")):
        tokenizer = from_pretrained(str(folder), chat_template=given, model_max_length=7)
        messages = [{"role": "user", "content": "some"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "some;"
        assert tokenizer.model_max_length == 7


def test_what_cannot_be_used_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer: there is none in .*empty"):
        from_pretrained(str(tmp_path / "empty"))
    tokenizer = from_pretrained(str(folder))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        from_pretrained(str(tmp_path / "endless"))
