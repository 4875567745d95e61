"""What records of conversations may look like: flags, columns beside the turns, other layouts."""

import json

import pytest

from ditty_di.data import Renderer
from tests.data import templates as t
from tests.data.templates import bot, chat_tokenizer, shown, user


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(t.CHATML)


@pytest.fixture
def texts(tokenizer):
    """Make the texts of a record's examples, with what is learnt in brackets, and its notes."""

    def make(record, template=t.CHATML, **options):
        tokenizer.chat_template = template
        (examples,) = Renderer(tokenizer, **options)([record])
        for example in examples:
            if isinstance(example, ValueError):
                raise example
        found = [shown(example, tokenizer) for example in examples]
        return found, {note for example in examples for note in example.notes}

    return make


def chat(*turns, **more):
    return {"messages": list(turns), **more}


def answers(text):
    return [part.split("⟧")[0] for part in text.split("⟦")[1:]]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, None)])
def test_a_turn_that_asks_not_to_be_learnt_is_not(texts, key, no, yes):
    turns = [user("a"), bot("b", **{key: no}), user("c"), bot("d", **{key: yes})]
    (text,), notes = texts(chat(*turns))
    assert answers(text) == ["d<|im_end|>"] and not notes
    assert texts(chat(*turns), assistant_turns="each")[0] == [text]
    turns = [user("a"), bot("b", **{key: yes}), user("c"), bot("d", **{key: no})]
    (text,), _ = texts(chat(*turns), assistant_turns="last")
    assert answers(text) == ["b<|im_end|>"], "the last one that may be learnt"
    (text,), _ = texts(chat(user("a"), bot("b", **{key: no})), assistant_turns="each")
    assert not answers(text)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"weight": 0.5}, '"weight" of turn 1 of "messages" is 0.5'),
        ({"train": "false"}, '"train" of turn 1 of "messages" is \'false\''),
        ({"train_detail": [{"begin_offset": 0}]}, 'turn 1 of "messages" has "train_detail"'),
    ],
)
def test_what_cannot_be_obeyed_is_refused(texts, turn, words):
    with pytest.raises(ValueError, match=words):
        texts(chat(user("a"), bot("b", **turn)))


def test_other_roles_that_ask_to_be_learnt_are_told(texts):
    _, notes = texts(chat(user("a", train=True), bot("b")))
    assert {tuple(note) for note in notes} == {("not_trained_on", "user")}
    assert not texts(chat(user("a", weight=1), bot("b", weight=1)))[1]


def test_a_prompt_and_a_completion_of_turns(texts):
    record = {"prompt": [user("a"), bot("b"), user("c")], "completion": [bot("d")]}
    (text,), notes = texts(record)
    assert answers(text) == ["d<|im_end|>"] and "b<|im_end|>" in text and not notes
    options = {"role_key": "from", "content_key": "value", "roles": {"gpt": "assistant"}}
    other = {
        "prompt": [{"from": "user", "value": "a"}],
        "completion": [{"from": "gpt", "value": "d"}],
    }
    assert answers(texts(other, **options)[0][0]) == ["d<|im_end|>"]
    with pytest.raises(
        ValueError, match=r'"completion" has no turn of the assistant.*\[\'user\'\]'
    ):
        texts(record | {"completion": [user("d")]})


def test_a_prompt_and_a_completion_of_text(texts):
    record = {"prompt": "a:", "completion": " b"}
    assert texts(record) == (["a:⟦ b<|endoftext|>⟧"], set())
    given = {"input_format": "__prompt__!", "output_format": "__completion__"}
    assert texts(record, **given)[0] == ["a:!⟦ b<|endoftext|>⟧"]
    with pytest.raises(ValueError, match='no key "input"'):
        texts(record, output_format="so__output__")


def test_a_system_column_is_the_first_turn_where_the_template_takes_one(texts):
    record = chat(user("a"), bot("b"), system="be brief")
    assert texts(record)[0][0].startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user"
    )
    same = chat({"role": "system", "content": "be brief"}, user("a"), bot("b"))
    assert texts(record) == texts(same) == texts(same | {"system": "be brief"})
    (text,), notes = texts(record, template=t.GEMMA)
    assert "brief" not in text
    for found in (notes, texts(same | {"system": "be long"})[1]):
        assert {tuple(note) for note in found} == {("unread_beside_turns", "system")}
    (text,), notes = texts(record, ignored_fields=["system"])
    assert "brief" not in text and not notes


def test_rows_of_token_ids_and_labels_are_taken_as_they_are(texts, tokenizer):
    ids = tokenizer("a b c d")["input_ids"] + [tokenizer.eos_token_id]
    labels = [-100, -100, *ids[2:]]
    row = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
    assert texts(row) == (["a b⟦ c d<|endoftext|>⟧"], set())
    padded = {k: [*v, *[0, 0]] for k, v in row.items()} | {"labels": [*labels, -100, -100]}
    assert texts(padded)[0] == ["a b⟦ c d<|endoftext|>⟧"], "padding is left out"
    assert texts(row, max_tokens=2)[0] == ["a b⟦ c⟧"]
    open_ended = {"input_ids": ids[:-1], "labels": labels[:-1]}
    assert [note.kind for note in texts(open_ended)[1]] == ["no_end_text"]
    for wrong, words in [
        ({"labels": labels[1:]}, '"labels" is not a list as long as "input_ids" \\(5\\)'),
        ({"labels": [*ids[1:], -100]}, '"labels" holds .* at 0.*not shifted'),
        ({"attention_mask": [1]}, '"attention_mask" is not a list as long'),
        ({"input_ids": [10**6]}, "token ids below"),
        ({"input_ids": "a b"}, "token ids below"),
    ]:
        with pytest.raises(ValueError, match=words):
            texts(row | wrong)


def test_segments_say_which_of_them_are_learnt(texts):
    segments = [
        {"label": False, "text": "a:"},
        {"label": True, "text": " b<|endoftext|>"},
        {"label": False, "text": "c:"},
        {"label": True, "text": " d<|endoftext|>"},
    ]
    assert texts({"segments": segments}) == (["a:⟦ b<|endoftext|>⟧c:⟦ d<|endoftext|>⟧"], set())
    for wrong in ([{"text": "a"}], [{"text": 5, "label": True}], "a"):
        with pytest.raises(ValueError, match="objects with a text and a label"):
            texts({"segments": wrong})


def test_fields_that_nothing_reads_are_named(texts):
    def unread(record, **options):
        return {note.subject for note in texts(record, **options)[1]}

    pair = {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]], "id": 0}
    assert unread(pair) == {"instruction", "history", "id"}
    read = {"input_format": "__instruction__\n__input__"}
    assert unread(pair, **read) == {"history", "id"}
    assert not unread(pair, **read, ignored_fields=["history", "id"])
    several = {"input_format": ["__instruction__ with __input__", "__topic__"]}
    assert unread(pair | {"topic": "x"}, **several) == {"topic", "history", "id"}
    assert unread(pair | {"topic": "x", "input": ""}, **several) == {"instruction", "history", "id"}
    assert not unread({"input": "a", "output": " b", "images": [], "history": None, "note": ""})
    assert unread(chat(user("a"), bot("b"), images=["x.png"], tools=[])) == {"images"}
    assert unread({"input": [5], "output": [6], "text": "a"}) == {"text"}
    assert Renderer(chat_tokenizer(t.CHATML)).unread(pair) == {"instruction", "history", "id"}
    with pytest.raises(ValueError, match='nothing reads "history", "id", "instruction"'):
        texts(pair, audit="refuse")


def test_columns_of_other_kinds_of_records_may_be_null(texts):
    nothing = dict.fromkeys(["messages", "prompt", "completion", "input_ids", "labels"])
    assert texts({**nothing, "input": "a:", "output": " b"}) == (["a:⟦ b<|endoftext|>⟧"], set())
    others = {**nothing, "input": None, "output": None, "segments": None}
    assert texts({**others, "prompt": "a:", "completion": " b"})[0] == ["a:⟦ b<|endoftext|>⟧"]
    record = chat(user("a"), bot("b"))
    assert texts({**nothing, **record, "input": None, "output": None}) == texts(record)


def test_turns_as_json_text(texts):
    turns = [user("a"), bot("b")]
    assert texts({"messages": json.dumps(turns)}) == texts({"messages": turns})


def test_an_answer_without_content_is_refused(texts):
    for turn in ({"role": "assistant"}, bot(None), {"role": "assistant", "contents": "b"}):
        with pytest.raises(ValueError, match='turn 1 of "messages" has no "content"'):
            texts(chat(user("a"), turn))
    _, notes = texts(chat(user("a"), bot("")))
    assert [note.kind for note in notes] == ["empty"]
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        texts(chat(user("\ud800"), bot("b")))


def test_bos_comes_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    adding = chat_tokenizer(t.LLAMA3)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    pair = {"input": "hi", "output": "yo"}
    for spelt in ("<s>[__input__]", "[__input__]"):
        renderer = Renderer(adding, input_format=spelt)
        ((example,),) = renderer([pair])
        assert shown(example, adding) == "<s>[hi]⟦yo<|endoftext|>⟧"
        assert renderer.prompt(pair) == example.ids[: example.inputs]
        ((cut,),) = Renderer(adding, input_format=spelt, max_input_tokens=2)([pair])
        assert shown(cut, adding) == "<s>]⟦yo<|endoftext|>⟧"
    ((example,),) = Renderer(adding)([chat(user("a"), bot("b"))])
    assert shown(example, adding).count("<s>") == 1
    tokenizer.chat_template = t.CHATML
    ((example,),) = Renderer(tokenizer, input_format="<s>__input__")([pair])
    assert shown(example, tokenizer).startswith("<s>hi"), "as it is spelt, where nothing is added"


def test_a_border_within_a_token_is_told_and_left(tokenizer):
    record = {"input": "def f():\n", "output": "    return 1"}
    ((example,),) = Renderer(tokenizer)([record])
    assert [note.kind for note in example.notes] == ["border"]
    assert shown(example, tokenizer) == "def f():\n⟦    return 1<|endoftext|>⟧"
    ((example,),) = Renderer(tokenizer, audit="refuse")([record])
    assert not isinstance(example, ValueError), "nothing is wrong with it"
    ((example,),) = Renderer(tokenizer)([{"input": "a:", "output": " b"}])
    assert not example.notes


@pytest.mark.parametrize("path", ["tool.function", "tool"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_schemas_of_tools_come_in_the_form_that_the_template_takes(texts, path, wrapped):
    shows = f"{{% for tool in tools or [] %}}<{{% set f = {path} %}}{{{{ f.name }}}}>{{% endfor %}}"
    tool = {"name": "weather", "description": "d", "parameters": {}}
    tools = [{"type": "function", "function": tool} if wrapped else tool]
    found, notes = texts({"messages": [user("a"), bot("b")], "tools": tools}, shows + t.CHATML)
    assert found[0].startswith("<weather><|im_start|>user")
    assert not notes


def test_arguments_that_change_the_generation_prompt_alone_are_read(texts):
    template = t.CHATML.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if think is false %}<think></think>{% endif %}{% endif %}",
    )
    assert "think" in template
    record = {"messages": [user("a"), bot("<think></think>b")]}
    for arguments, kinds in (({"think": False}, set()), ({"other": 1}, {"kwargs"})):
        _, notes = texts(record | {"chat_template_kwargs": arguments}, template)
        assert {note.kind for note in notes} - {"border"} == kinds


def test_a_function_call_is_told_its_place(texts):
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    with pytest.raises(ValueError, match=r'"function_call": write it as "tool_calls"'):
        texts({"messages": [user("a"), call]})
