import pytest

from ditty_di.data import Renderer
from tests.data.words import CHAT, MASKED, UNSTABLE, word_tokenizer


def encode(record, tokenizer=None, **options):
    """The one example of a record, as text, with what is output in [brackets]."""
    tokenizer = tokenizer or word_tokenizer()
    ((example,),) = Renderer(tokenizer, **options)([record])
    if isinstance(example, ValueError):
        raise example
    return shown(example, tokenizer)


def shown(example, tokenizer):
    text, inside = "", False
    for i, output in zip(example.ids, example.output, strict=True):
        text += "[" * (output and not inside) + "]" * (inside and not output)
        text, inside = text + tokenizer.convert_ids_to_tokens(i), output
    return text + "]" * inside


AB = {"input": "a b", "output": "c d"}


def test_input_and_output_are_tokenized_apart_and_eos_ends_the_output():
    assert encode(AB) == "a b[c d<eos>]"
    assert encode(AB, input_format="question:__input__\n", output_format="answer __output__") == (
        "question:a b\n[answer c d<eos>]"
    )


def test_the_input_begins_as_the_tokenizer_begins_a_text():
    assert encode(AB, word_tokenizer(bos=True)) == "<bos>a b[c d<eos>]"
    t5 = word_tokenizer(eos_after=True)
    assert encode(AB, t5) == "a b[c d<eos>]", "what ends a text does not stand in its middle"
    assert encode(AB, t5, end_input=True) == "a b<eos>[c d<eos>]"


def test_an_output_that_ends_with_eos_gets_no_second_one():
    assert encode({"input": "a", "output": "b<eos>"}) == "a[b<eos>]"


def test_pad_and_eos_of_one_id_do_not_matter():
    assert encode(AB, word_tokenizer(pad_token="<eos>")) == "a b[c d<eos>]"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_input_tokens": 2}, "<bos>b[c d<eos>]"),
        ({"max_input_tokens": 2, "truncate_input": "right"}, "<bos>a[c d<eos>]"),
        ({"max_input_tokens": 1}, "<bos>[c d<eos>]"),
        ({"max_output_tokens": 4}, "<bos>a b[c d<eos>]"),
        ({"max_output_tokens": 3}, "<bos>a b[c d]"),
        ({"max_tokens": 7}, "<bos>a b[c d<eos>]"),
        ({"max_tokens": 6}, "<bos>a b[c d]"),
        ({"max_tokens": 3}, "<bos>a b"),
        ({"max_tokens": 2}, "<bos>a "),
    ],
)
def test_limits_keep_the_end_of_inputs_and_the_beginning_of_outputs(options, expected):
    """EOS stays only where the output is whole, and a row of max_tokens has one id more."""
    tokenizer = word_tokenizer(bos=True)
    assert encode(AB, tokenizer, **options) == expected
    ((example,),) = Renderer(tokenizer, **options)([AB])
    assert example.cut == (expected != "<bos>a b[c d<eos>]")


def test_ids_are_taken_as_they_are():
    record = {"input": [7, 8], "output": [9]}
    assert encode(record, word_tokenizer(bos=True), input_format="?__input__") == "<bos> \n[a<eos>]"
    with pytest.raises(
        ValueError,
        match=f'"output" holds a list, but not of token ids below {len(word_tokenizer())}',
    ):
        encode({"input": [7], "output": [len(word_tokenizer())]})


def test_records_of_both_kinds_keep_their_order():
    tokenizer = word_tokenizer(chat_template=CHAT)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    found = Renderer(tokenizer)([chat, AB, ValueError("bad"), chat])
    texts = [shown(e, tokenizer) if hasattr(e, "ids") else str(e) for (e,) in found]
    assert texts == ["<user>a<end><bot>[b<end>]", "a b[c d<eos>]", "bad", texts[0]]


TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def conversation(turns=TURNS, **more):
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def test_every_answer_is_learnt_with_its_end_of_turn():
    tokenizer = word_tokenizer(chat_template=CHAT)
    assert encode(conversation(), tokenizer) == "<user>a<end><bot>[b<end>]<user>c<end><bot>[d<end>]"
    after = conversation([*TURNS, ("user", "e")])
    assert encode(after, tokenizer).endswith("<bot>[d<end>]"), "nothing is learnt behind it"
    limited = encode(conversation(), tokenizer, max_tokens=6)
    assert limited == "<user>a<end><bot>[b<end>]<user>"


def test_the_templates_own_mask_decides_where_it_has_one():
    tokenizer = word_tokenizer(chat_template=MASKED)
    assert encode(conversation(), tokenizer) == "<user>a<end><bot>[b]<end><user>c<end><bot>[d]<end>"


def test_a_template_that_rewrites_earlier_turns_is_refused_or_taken_turn_by_turn():
    tokenizer = word_tokenizer(chat_template=UNSTABLE)
    with pytest.raises(ValueError, match=r"renders earlier turns differently.*turn 1.*each"):
        encode(conversation(), tokenizer)
    assert encode(conversation(TURNS[:2]), tokenizer) == "<user>a<end><bot>[!b<end>]"
    (each,) = Renderer(tokenizer, assistant_turns="each")([conversation()])
    assert [shown(example, tokenizer) for example in each] == [
        "<user>a<end><bot>[!b<end>]",
        "<user>a<end><bot>b<end><user>c<end><bot>[!d<end>]",
    ]
    last = encode(conversation(), tokenizer, assistant_turns="last")
    assert last == "<user>a<end><bot>b<end><user>c<end><bot>[!d<end>]"


def test_a_token_across_the_border_of_prompt_and_answer_is_split_there():
    """In use the prompt is tokenized alone, so training has to see the same tokens."""
    template = CHAT.replace("'<bot>'", "'posi'").replace("<bot>", "posi")
    tokenizer = word_tokenizer(chat_template=template)
    turns = [("user", "a"), ("assistant", "tive")]
    text = encode(conversation(turns), tokenizer)
    assert text == "<user>a<end><unk>[<unk><end>]", "not [positive]"


def test_other_names_of_roles_and_keys():
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    options = {
        "messages_key": "conversations",
        "role_key": "from",
        "content_key": "value",
        "roles": {"human": "user", "gpt": "assistant"},
    }
    tokenizer = word_tokenizer(chat_template=CHAT)
    assert encode(record, tokenizer, **options) == "<user>a<end><bot>[b<end>]"
    with pytest.raises(ValueError, match=r"no turn of the assistant.*\['gpt', 'human'\].*roles"):
        encode(record, tokenizer, **{**options, "roles": None})


def test_tools_reach_the_template():
    template = "{{ tools[0].name }}" + CHAT
    tokenizer = word_tokenizer(chat_template=template)
    record = conversation(TURNS[:2], tools=[{"name": "question"}])
    assert encode(record, tokenizer) == "question<user>a<end><bot>[b<end>]"


def test_what_is_wrong_with_a_record():
    for record, words in [
        ({"output": "a"}, r'no key "input" among \[\'output\'\]'),
        ({"input": "a"}, 'no key "output"'),
        ({"input": "a", "output": None}, '"output" is null'),
        ({"input": {}, "output": "a"}, '"input" holds a dict'),
        ({"input": "\ud800", "output": "a"}, "surrogate"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": "a"}, "must be a list of objects"),
        ({"messages": [{"content": "a"}]}, 'turn 0 of "messages" has no "role"'),
    ]:
        with pytest.raises(ValueError, match=words):
            encode(record, word_tokenizer(chat_template=CHAT))
    refusing = word_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses it: roles must alternate"):
        encode(conversation(), refusing)


def test_what_the_tokenizer_cannot_do_is_said_once():
    with pytest.raises(ValueError, match=r"no chat template.*chat_template"):
        Renderer(word_tokenizer())([conversation()])
    with pytest.raises(ValueError, match="no EOS token"):
        Renderer(word_tokenizer(eos_token=None))([AB])


def test_bad_options():
    for options, words in [
        ({"truncate_input": "up"}, "truncate_input='up' must be one of left, right"),
        ({"assistant_turns": "some"}, "assistant_turns='some' must be one of all, each, last"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"input_format": "no field"}, "'no field' has no placeholder such as __input__"),
    ]:
        with pytest.raises(ValueError, match=words):
            Renderer(word_tokenizer(), **options)


def test_the_fingerprint_knows_tokenizer_and_options():
    base = Renderer(word_tokenizer()).fingerprint()
    assert base == Renderer(word_tokenizer()).fingerprint()
    others = [
        Renderer(word_tokenizer(bos=True)),
        Renderer(word_tokenizer(chat_template=CHAT)),
        Renderer(word_tokenizer(), input_format="?__input__"),
        Renderer(word_tokenizer(), max_tokens=9),
        Renderer(word_tokenizer(), roles={"a": "b"}),
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == 6


def test_a_prompt_is_what_stands_before_the_output():
    renderer = Renderer(word_tokenizer(bos=True), input_format="__input__\nanswer:")
    ((example,),) = renderer([AB])
    assert renderer.prompt({"input": "a b"}) == example.ids[: example.inputs]
    assert renderer.prompt_text(example) == "a b\nanswer:", "the tokenizer adds BOS again"


def test_token_ids_say_by_their_masks_what_is_learnt():
    ids = word_tokenizer().convert_tokens_to_ids([*"abcd"])
    row = {"input_ids": ids}
    assert encode(row | {"completion_mask": [0, 0, 1, 1]}) == "ab[cd]"
    assert encode(row | {"labels": ids, "assistant_masks": [0, 1, 0, 0]}) == "a[b]cd"
    assert encode(row | {"labels": [-100, *ids[1:]], "completion_mask": [1, 1, 1, 0]}) == "a[bc]d"
    with pytest.raises(ValueError, match='"completion_mask" holds other values'):
        encode(row | {"completion_mask": [0, 0, 2, 1]})
    with pytest.raises(ValueError, match='"assistant_masks" is not a list as long'):
        encode(row | {"assistant_masks": [1]})


def test_token_ids_without_labels_are_learnt_and_it_is_said():
    tokenizer = word_tokenizer()
    ids = tokenizer.convert_tokens_to_ids([*"abc"])
    ((example,),) = Renderer(tokenizer)([{"input_ids": ids, "attention_mask": [1, 1, 0]}])
    assert shown(example, tokenizer) == "[ab]"
    assert "all_in_loss" in {note.kind for note in example.notes}
    assert encode(AB | {"input_ids": ids}) == "a b[c d<eos>]"  # what can be read is
