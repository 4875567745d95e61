import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel

from ditty_di.data import Renderer
from ditty_di.data.rendering.templates import PromptTemplate
from ditty_di.data.rendering.token_spans import TokenSpans
from tests.data import templates as t
from tests.data.templates import bot, chat_tokenizer, shown, user

ALIASES = {"input": "question", "output": "answer"}


def test_the_first_occurrence_is_replaced_and_fields_may_be_named():
    form = PromptTemplate("__input__ (__topic__): __input__", ALIASES)
    assert form({"question": "why", "topic": 3}) == "why (3): __input__"


@given(st.text(), st.text())
def test_what_is_put_in_is_not_looked_at_again(a, b):
    record = {"question": a + "__answer__", "answer": b + "__question__"}
    form = PromptTemplate("<__input__|__output__>", ALIASES)
    try:
        expected = f"<{record['question']}|{record['answer']}>"
        expected.encode()
    except UnicodeEncodeError:
        return
    assert form(record) == expected


def test_the_first_format_whose_fields_have_text():
    form = PromptTemplate(["__a__ with __b__", "__a__ alone"], {})
    assert form({"a": "x", "b": "y"}) == "x with y"
    for record in ({"a": "x", "b": ""}, {"a": "x", "b": None}, {"a": "x"}):
        assert form(record) == "x alone"
    assert form({"a": "", "b": "y"}) == " alone", "the last one in any case"
    with pytest.raises(ValueError, match=r'no key "a" among \[\'b\'\]'):
        form({"b": "y"})


def test_zero_and_false_are_text():
    assert PromptTemplate(["__a__", "__b__"], {})({"a": 0, "b": "other"}) == "0"


def test_truth_values_are_written_as_in_json():
    assert PromptTemplate("__a__ __b__", {})({"a": True, "b": False}) == "true false"


def test_names_with_underscores():
    assert PromptTemplate("__long_name____b__", {})({"long_name": "x", "b": "y"}) == "xy"


# --- chat templates ------------------------------------------------------------------------------


def learnt(template, record, *, tokenizer=None, **options):
    """The examples of a record as texts with what is learnt in brackets, and the kinds of notes."""
    tokenizer = tokenizer or chat_tokenizer(template)
    (examples,) = Renderer(tokenizer, **options)([record])
    for example in examples:
        if isinstance(example, ValueError):
            raise example
    notes = {note.kind for example in examples for note in example.notes}
    return [shown(example, tokenizer) for example in examples], notes


ONE = {"messages": [user("hi"), bot("yes")]}
TWO = {"messages": [user("hi"), bot("yes"), user("so"), bot("no")]}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (t.CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
            "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"),
        (t.SYSTEM, "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nso<|im_end|>\n"
            "<|im_start|>assistant\n⟦no<|im_end|>⟧\n"),
        (t.LLAMA3, "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>"
            "assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>"
            "\n\nso<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦no<|eot_id|>⟧"),
        (t.MISTRAL, "<s>[INST] hi [/INST]⟦ yes<|endoftext|>⟧[INST] so [/INST]⟦ no<|endoftext|>⟧"),
        (t.GEMMA, "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
            "⟦yes<end_of_turn>⟧\n<start_of_turn>user\nso<end_of_turn>\n<start_of_turn>model\n"
            "⟦no<end_of_turn>⟧\n"),
        (t.PHI3, "<|user|>\nhi<|end|>\n<|assistant|>\n⟦yes<|end|>⟧\n<|user|>\nso<|end|>\n"
            "<|assistant|>\n⟦no<|end|>⟧\n<|endoftext|>"),
        (t.CLOSED, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
            "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"),
    ],
)  # fmt: skip
def test_an_answer_is_learnt_up_to_the_token_that_ends_its_turn(template, expected):
    """The newline behind it is the template's: the model stops before."""
    texts, notes = learnt(template, TWO)
    assert texts == [expected] and notes <= {"border"}
    only_last, _ = learnt(template, TWO, assistant_turns="last")
    assert only_last == [expected.replace("⟦", "", 1).replace("⟧", "", 1)]


def test_the_prompt_of_a_chat_is_what_stands_before_the_answer():
    for template in (t.CHATML, t.SYSTEM, t.LLAMA3, t.MISTRAL, t.GEMMA, t.PHI3, t.GPT_OSS):
        renderer = Renderer(chat_tokenizer(template))
        ((example,),) = renderer([ONE])
        start = example.output.index(True)
        assert (
            renderer.prompt(ONE) == renderer.prompt({"prompt": [user("hi")]}) == example.ids[:start]
        )


@pytest.mark.parametrize(
    ("template", "one", "two"),
    [
        (t.DEEPSEEK, "<s><|User|>hi<|Assistant|>⟦yes<|eos|>⟧",
            "<s><|User|>hi<|Assistant|>⟦yes<|eos|>⟧<|User|>so<|Assistant|>⟦no<|eos|>⟧"),
        (t.NEMOTRON, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>"
            "⟦</think>yes<|im_end|>⟧\n",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>⟦</think>yes<|im_end|>⟧\n"
            "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n<think>⟦</think>no<|im_end|>⟧\n"),
    ],
)  # fmt: skip
def test_a_generation_prompt_that_is_not_a_prefix_starts_the_answer_where_they_part(
    template, one, two
):
    tokenizer = chat_tokenizer(template)
    tokenizer.add_tokens(["<think>", "</think>"])
    assert learnt(template, ONE, tokenizer=tokenizer) == ([one], {"other_prompt"})
    assert learnt(template, TWO, tokenizer=tokenizer) == ([two], {"other_prompt"})
    ((example,),) = Renderer(tokenizer)([ONE])
    assert any(note.subject.endswith("<think>\n") for note in example.notes), "and it is named"


def test_whitespace_before_the_generation_prompt_does_not_make_it_a_part_of_the_answer():
    template = t.CHATML.replace("<|im_end|>\n", "<|im_end|>{{ '' if loop.last else '\n' }}")
    ((text,), _) = learnt(template, TWO)
    assert text.count("⟦") == 2 and "⟦yes<|im_end|>⟧" in text and text.endswith("⟦no<|im_end|>⟧")


def test_where_the_next_turns_marker_ends_a_turn_it_is_learnt():
    texts, notes = learnt(t.GLM, TWO)
    assert texts == [
        "[gMASK]<sop><|user|>\nhi<|assistant|>\n⟦yes<|user|>⟧\nso<|assistant|>\n⟦no<|user|>⟧"
    ]
    assert notes == {"next_marker"}
    each, _ = learnt(t.GLM, TWO, assistant_turns="each")
    assert each[0] == "[gMASK]<sop><|user|>\nhi<|assistant|>\n⟦yes<|user|>⟧"
    calling = [user("hi"), CALL, {"role": "tool", "content": "5"}, bot("five")]
    (text,), _ = learnt(t.GLM, {"messages": calling})
    end = "⟦<tool_call>w\ncity=Rome</tool_call><|observation|>⟧"
    assert text.endswith(f"{end}\n5<|assistant|>\n⟦five<|user|>⟧")
    (text,), _ = learnt(t.GLM, {"messages": calling[:2]})
    assert text.endswith(end), "a call is followed by the tool"


def test_answers_without_an_end_are_told_or_refused():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for template in (t.MARKED, plain):
        assert learnt(template, TWO)[1] == {"no_end"}
        with pytest.raises(ValueError, match="no end of turn is trained on"):
            learnt(template, TWO, audit="refuse")
    # The same template: what is not one token to the tokenizer cannot stop a generation.
    unaware = chat_tokenizer(t.CHATML, special=[])
    assert learnt(None, ONE, tokenizer=unaware)[1] == {"no_end"}
    unaware.add_tokens(["<|im_end|>"])
    texts, notes = learnt(None, ONE, tokenizer=unaware)
    assert texts[0].endswith("⟦yes<|im_end|>⟧\n") and not notes, "an added token is one"


def test_marks_are_found_by_rendering():
    unmarked, _ = learnt(t.CHATML, TWO)
    for before in (
        "{# {% generation %} #}",
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
        "{% raw %}{% endraw %}",
    ):
        assert learnt(before + t.CHATML, TWO) == (unmarked, set())
    assert "⟦yes⟧<|im_end|>" in learnt(t.MARKED.replace("{% gen", "{%+ gen"), TWO)[0][0]


@pytest.mark.parametrize("template", [t.MARKED, t.CLOSED])
def test_marks_decide_whichever_answers_are_learnt(template):
    (whole,), _ = learnt(template, TWO)
    first, second = whole.split("<|im_start|>user\nso")
    second = "<|im_start|>user\nso" + second
    unlearnt = first.replace("⟦", "").replace("⟧", "")
    assert learnt(template, TWO, assistant_turns="each")[0] == [first, unlearnt + second]
    assert learnt(template, TWO, assistant_turns="last")[0] == [unlearnt + second]
    flagged = {"messages": [user("hi"), bot("yes", weight=0), user("so"), bot("no")]}
    assert learnt(template, flagged)[0] == [unlearnt + second]


def test_an_answer_that_nothing_is_before_begins_with_its_content():
    greeting = {"messages": [bot("yes"), user("so"), bot("no")]}
    for template, header in [
        (t.CHATML, "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"),
        (t.LLAMA3, "<s><|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧"),
    ]:
        (text,), _ = learnt(template, greeting)
        assert text.startswith(header) and text.count("⟦") == 2


@pytest.mark.parametrize("template", [t.QWEN3, t.GPT_OSS])
def test_earlier_turns_that_change_are_refused_and_the_message_is_true(template):
    with pytest.raises(ValueError, match=r"turn 1.*data\.renderer\.assistant_turns=each"):
        learnt(template, TWO)
    each, _ = learnt(template, TWO, assistant_turns="each")
    assert len(each) == 2 and all(text.count("⟦") == 1 for text in each)
    # With one answer no later turn is at fault, so another choice of turns would not help.
    unprompted = "{{ messages | length }}" + t.CHATML
    with pytest.raises(
        ValueError, match=r"before turn 1 differently.*'1<\|im_start\|>user"
    ) as told:
        learnt(unprompted, ONE)
    assert "assistant_turns" not in str(told.value)


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_borders_do_not_depend_on_what_offsets_leave_out(trim_offsets):
    """A space at the border of prompt and answer is the prompt's, or the answer's: by the text."""
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim_offsets)
    for question, answer, expected in [
        ("a:", " b<|end|>", "a:⟦ b<|end|>⟧"),
        ("a: ", "1<|end|>", "a: ⟦1<|end|>⟧"),
        ("a\n", "\tb<|end|>", "a\n⟦\tb<|end|>⟧"),
        ("a", "\n\n<|end|>", "a⟦\n\n<|end|>⟧"),
    ]:
        record = {"messages": [user(question), bot(answer)]}
        (text,), _ = learnt(None, record, tokenizer=tokenizer)
        assert text == expected
    marked = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    marked += "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    tokenizer.chat_template = marked
    (text,), _ = learnt(None, {"messages": [user("a"), bot(" b <|end|>")]}, tokenizer=tokenizer)
    assert text == "a⟦ b <|end|>⟧"


TOKENIZERS = {
    (template, trim): chat_tokenizer(template)
    for template in (t.CHATML, t.MISTRAL, t.NEMOTRON)
    for trim in (True, False)
}


@pytest.mark.parametrize(("template", "trim_offsets"), TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(" \n\ta0.é😀", min_size=1, max_size=8), min_size=4, max_size=4))
def test_what_is_before_an_answer_are_the_ids_of_its_prompt(template, trim_offsets, texts):
    """And what is learnt is the answer's text with its end, whatever whitespace is around."""
    tokenizer = TOKENIZERS[template, trim_offsets]
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim_offsets)
    turns = [make(text) for make, text in zip((user, bot) * 2, texts, strict=True)]
    ((whole,),) = Renderer(tokenizer)([{"messages": turns}])
    parts = [part.split("⟧")[0] for part in shown(whole, tokenizer).split("⟦")[1:]]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert shown(whole, tokenizer).replace("⟦", "").replace("⟧", "") == rendered
    assert all(text in part for text, part in zip(texts[1::2], parts, strict=True))
    assert all(part.endswith(("<|im_end|>", "<|endoftext|>")) for part in parts)
    ((first,),) = Renderer(tokenizer)([{"messages": turns[:2]}])
    start = first.output.index(True)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    if template != t.NEMOTRON:
        assert first.ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_slow_tokenizer_is_split_where_its_prompt_ends():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return {"input_ids": [len(word) for word in re.findall(r"\S+|\s", text)]}

    spans = TokenSpans(Slow())
    assert spans.split("ab c def", [3, 4]) == ([2, 1, 1, 1, 3], [0, 0, 1, 2, 2], False)
    assert spans.split("abcd", [1]) == ([1, 3], [0, 1], True), "a token would span the border"


# --- what templates take -------------------------------------------------------------------------

CALL = bot(None, tool_calls=[{"type": "function", "function": {"name": "w", "arguments": None}}])
CALL["tool_calls"][0]["function"]["arguments"] = {"city": "Rome"}


def with_arguments(arguments, flat=False):
    function = {"name": "w", "arguments": arguments}
    call = function if flat else {"type": "function", "function": function}
    return {"messages": [user("hi"), bot(None, tool_calls=[call])]}


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (t.QWEN3, '<tool_call>w {"city": "Rome"}</tool_call><|im_end|>⟧'),
        (t.GLM, "⟦<tool_call>w\ncity=Rome</tool_call><|observation|>⟧"),
        (t.DEEPSEEK, '⟦<|call|>w\n{"city": "Rome"}<|eos|>⟧'),
        # Prints an object in Python's notation, which no tool takes.
        (t.DEEPSEEK.replace("'\n' + c.function.arguments", "'\n' ~ c.function.arguments"),
            '⟦<|call|>w\n{"city": "Rome"}<|eos|>⟧'),
    ],
)  # fmt: skip
def test_arguments_of_tools_come_in_the_form_that_the_template_takes(
    template, expected, arguments, flat
):
    (text,), _ = learnt(template, with_arguments(arguments, flat))
    assert expected in text


def test_a_null_that_is_written_in_json_stays():
    (text,), _ = learnt(t.QWEN3, with_arguments({"city": None}))
    assert '{"city": null}' in text
    (text,), _ = learnt(t.QWEN3, with_arguments('{"city": null}'))
    assert '{"city": null}' in text


def test_arguments_that_are_not_an_object_are_refused():
    with pytest.raises(ValueError, match=r'"arguments" of a tool call of turn 1.*\'{"city\''):
        learnt(t.QWEN3, with_arguments('{"city'))
    (text,), _ = learnt(t.QWEN3, with_arguments(""))
    assert "w {}</tool_call>" in text


TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {}}}]


def test_tools_may_be_text_and_have_to_be_objects():
    expected = learnt(t.QWEN3, ONE | {"tools": TOOLS})
    assert '"name": "w"' in expected[0][0] and not expected[1]
    for tools in (json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        assert learnt(t.QWEN3, ONE | {"tools": tools}) == expected
    for nothing in (None, [], "[]", ""):
        assert learnt(t.QWEN3, ONE | {"tools": nothing}) == learnt(t.QWEN3, ONE)
    for wrong, words in [
        ("[{'name': 'w'}]", '"tools" is text that is not JSON'),
        (["w"], 'tool 0 of "tools" is text that is not JSON'),
        ({"name": "w"}, '"tools" must be a list of objects'),
        ([5], '"tools" must be a list of objects'),
    ]:
        with pytest.raises(ValueError, match=words):
            learnt(t.QWEN3, ONE | {"tools": wrong})


def test_what_the_template_does_not_render_is_told():
    record = with_arguments({"city": "Rome"}) | {"tools": TOOLS}
    assert learnt(t.CHATML, record)[1] == {"tools", "tool_calls", "empty"}
    assert learnt(t.QWEN3, record)[1] == set()
    thinking = {"messages": [user("hi"), bot("yes", reasoning_content="hm")]}
    assert learnt(t.CHATML, thinking)[1] == {"unread_in_turns"}
    assert learnt(t.CHATML, thinking, ignored_fields=["reasoning_content"])[1] == set()
    assert learnt(t.QWEN3, thinking)[1] == set()
    assert learnt(t.CHATML, ONE | {"chat_template_kwargs": {"x": 1}})[1] == {"kwargs"}
    dropping = t.CHATML.replace("messages %}", "messages if m.role != 'tool' %}", 1)
    tool = {"messages": [*ONE["messages"], {"role": "tool", "content": "five"}]}
    assert learnt(dropping, tool)[1] == {"unread_roles"}
    with pytest.raises(ValueError, match=r"not render tool calls.*not render tools"):
        learnt(t.CHATML, record, audit="refuse")


def test_arguments_of_the_template_come_with_the_record():
    template = t.CHATML.replace("assistant\n{%", "assistant\n{{ mode }}{%")
    template = template.replace("{{ m.role }}\n", "{{ m.role }}\n{{ mode if m.role != 'user' }}")
    for kwargs in ({"mode": "<|end|>"}, '{"mode": "<|end|>"}'):
        (text,), notes = learnt(template, ONE | {"chat_template_kwargs": kwargs})
        assert text.endswith("<|end|>⟦yes<|im_end|>⟧\n") and not notes
    for wrong, words in [(["x"], "must be an object"), ({"tokenize": True}, "cannot set tokenize")]:
        with pytest.raises(ValueError, match=words):
            learnt(template, ONE | {"chat_template_kwargs": wrong})


def test_contents_are_text_or_parts_as_the_template_takes_them():
    parts = {
        "messages": [
            user([{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image": None}]),
            bot([{"type": "text", "text": "yes"}]),
        ]
    }
    expected = learnt(t.CHATML, ONE)
    for template in (t.CHATML, t.PARTS):
        assert learnt(template, parts) == learnt(template, ONE) == expected
    for part, words in [
        ({"type": "image", "image": "x.png"}, "'image'"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text"}, "without text"),
        (5, "a list with a int"),
    ]:
        with pytest.raises(ValueError, match=f'"content" of turn 0.*{words}'):
            learnt(t.CHATML, {"messages": [user([part]), bot("yes")]})
    with pytest.raises(ValueError, match='"content" of turn 0 of "messages" holds a dict'):
        learnt(t.CHATML, {"messages": [user({"a": 1}), bot("yes")]})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 5 }}", "TypeError"),
        ("{{ messages[0].nothing.more }}", "has no attribute"),
        ("{{ messages[9].content.x }}", "refuses it"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        (
            "{{ messages | map('upper') | list | tojson }}{{ messages.append(1) }}",
            "refuses it|render",
        ),
        ("{% for %}", "refuses it"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal_of_the_record(template, words):
    with pytest.raises(ValueError, match=f"the chat template .*({words})"):
        learnt(template, ONE)
