"""The tokenizer of a pretrained model."""

import pytest

from ditty_di.data import train_bpe
from ditty_di.data.tokenizer import document_end_id
from ditty_di.models.tokenizer import end_of_turn_ids, from_pretrained, user_turn


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
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})  # as BERT's, which has no other end
    tokenizer.save_pretrained(tmp_path / "encoder")
    found = from_pretrained(str(tmp_path / "encoder"))
    assert found.eos_token_id is None
    assert document_end_id(found) == found.sep_token_id == found.convert_tokens_to_ids("[SEP]")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPEN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}{{ m.content[0].text + '<|im_end|>' }}{% endfor %}"
TWO_ENDS = (
    "{% for m in messages %}{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "tokens", "ends"),
    [
        (CHATML, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
        (PARTS, ["<|im_end|>"], ["<|im_end|>"]),
        (TWO_ENDS, ["<|return|>", "<|end|>"], ["<|return|>"]),
        # Where the next role's marker ends a turn, a user or a tool may be next.
        (OPEN, ["<|user|>", "<|tool|>", "<|assistant|>"], ["<|user|>", "<|tool|>"]),
        (STRICT, ["<|user|>", "<|tool|>", "<|assistant|>"], ["<|user|>"]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", [], []),
        (
            "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
            ["<|im_end|>"],
            [],
        ),
        ("{{ 1 // 0 }}", [], []),
        (None, ["<|im_end|>"], []),
    ],
)
def test_the_end_of_an_assistant_turn_is_found_by_rendering(folder, template, tokens, ends):
    tokenizer = from_pretrained(str(folder), special_tokens=tokens, chat_template=template)
    assert [tokenizer.decode([i]) for i in end_of_turn_ids(tokenizer)] == ends


def test_an_added_token_ends_a_turn_though_it_is_not_special(folder):
    tokenizer = from_pretrained(str(folder), chat_template=CHATML)
    tokenizer.add_tokens(["\n", "<|im_end|>"])
    assert tokenizer.decode(end_of_turn_ids(tokenizer)) == "<|im_end|>"
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = plain
    assert end_of_turn_ids(tokenizer) == [], "a line break between turns is no end of one"


INJECTING = "{% if messages[0].role != 'system' %}<|im_start|>system\nHi<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "around"),
    [
        (CHATML, ("<|im_start|>user\n", "<|im_end|>")),
        (INJECTING + CHATML, ("<|im_end|>\n<|im_start|>user\n", "<|im_end|>")),
        # The tokens before it end alike, and are no part of it.
        (
            "<|bos|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
            "{% if m.role == 'assistant' %}<|eos|>{% endif %}{% endfor %}",
            ("<|user|>", ""),
        ),
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }};\n{% endfor %}",
            ("[user] ", ";\n"),
        ),
        ("{{ 1 // 0 }}", ("", "")),
        (None, ("", "")),
    ],
)
def test_what_stands_around_a_users_words_is_found_by_rendering(folder, template, around):
    tokens = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|bos|>", "<|eos|>", "<|assistant|>"]
    tokenizer = from_pretrained(str(folder), special_tokens=tokens, chat_template=template)
    assert user_turn(tokenizer) == around
