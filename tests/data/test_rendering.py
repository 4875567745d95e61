import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditty_di.data.rendering import Format

ALIASES = {"input": "question", "output": "answer"}


def test_the_first_occurrence_is_replaced_and_fields_may_be_named():
    form = Format("__input__ (__topic__): __input__", ALIASES)
    assert form({"question": "why", "topic": 3}) == "why (3): __input__"


@given(st.text(), st.text())
def test_what_is_put_in_is_not_looked_at_again(a, b):
    record = {"question": a + "__answer__", "answer": b + "__question__"}
    form = Format("<__input__|__output__>", ALIASES)
    try:
        expected = f"<{record['question']}|{record['answer']}>"
        expected.encode()
    except UnicodeEncodeError:
        return
    assert form(record) == expected


def test_the_first_format_whose_fields_have_text():
    form = Format(["__a__ with __b__", "__a__ alone"], {})
    assert form({"a": "x", "b": "y"}) == "x with y"
    for record in ({"a": "x", "b": ""}, {"a": "x", "b": None}, {"a": "x"}):
        assert form(record) == "x alone"
    assert form({"a": "", "b": "y"}) == " alone", "the last one in any case"
    with pytest.raises(ValueError, match=r'no key "a" among \[\'b\'\]'):
        form({"b": "y"})


def test_zero_and_false_are_text():
    assert Format(["__a__", "__b__"], {})({"a": 0, "b": "other"}) == "0"


def test_names_with_underscores():
    assert Format("__long_name____b__", {})({"long_name": "x", "b": "y"}) == "xy"
