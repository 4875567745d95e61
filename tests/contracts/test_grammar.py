from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.contracts.grammar import DTYPES, Contract, ContractError, Entry

LETTERS = "acdeghjklmnopqrstuvwxyz"
identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
paths = st.lists(identifiers, min_size=1, max_size=3).map(".".join)
positions = st.integers(0, 63).map(str)
variables = st.builds(
    lambda letter, more: f"{letter}+{more}" if more else letter,
    st.sampled_from(LETTERS),
    st.integers(0, 64),
)
ranks = st.one_of(st.integers(0, 64), st.just("*"), variables)
dtypes = st.none() | st.sampled_from(sorted(DTYPES))


def entries(names):
    one = st.builds(Entry, names, ranks, dtypes)
    return st.lists(one, max_size=4, unique_by=lambda e: e.name).map(tuple)


contracts = st.builds(
    Contract,
    inputs=entries(identifiers | positions),
    reads=entries(paths),
    outputs=entries(identifiers),
    writes=entries(paths),
)


@settings(deadline=None)
@given(contracts)
def test_the_canonical_text_parses_to_the_same_contract(contract):
    assert Contract.parse(str(contract)) == contract
    assert str(Contract.parse(str(contract))) == str(contract)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="ab0n19:|->,*+. ctxfi64\n\t", max_size=40))
def test_no_text_does_anything_but_parse_or_raise_a_contract_error(text):
    try:
        contract = Contract.parse(text)
    except ContractError:
        return
    assert Contract.parse(str(contract)) == contract


@settings(deadline=None)
@given(contracts, st.data())
def test_one_character_more_or_less_is_no_crash_either(contract, data):
    text = str(contract)
    at = data.draw(st.integers(0, len(text)))
    for near in (text[:at] + data.draw(st.characters()) + text[at:], text[:at] + text[at + 1 :]):
        try:
            Contract.parse(near)
        except ContractError as error:
            assert "^" in str(error)


@given(st.none() | st.integers() | st.binary() | st.lists(st.text()))
def test_what_is_no_text_is_a_contract_error(value):
    with pytest.raises(ContractError, match="a contract is text"):
        Contract.parse(value)


@pytest.mark.parametrize(
    "text, same_as",
    [
        # both documented spellings: a | reads -> b, and a -> b | writes
        ("a:2:f | ctx.x:1:i64 -> b:0", Contract((Entry("a", 2, "f"),), (Entry("x", 1, "i64"),),
                                                (Entry("b", 0),))),
        ("batch:3:i64 -> batch:3:i64 | ctx.t:1:i64", Contract((Entry("batch", 3, "i64"),), (),
                                     (Entry("batch", 3, "i64"),), (Entry("t", 1, "i64"),))),
        # behind the bar the prefix may be missing; before it, it moves the entry
        ("a:2 | x:1 -> ", Contract((Entry("a", 2),), (Entry("x", 1),))),
        ("a:2, ctx.x:1, b:3 ->", Contract((Entry("a", 2), Entry("b", 3)), (Entry("x", 1),))),
        ("-> b:1, ctx.y:0:b", Contract((), (), (Entry("b", 1),), (Entry("y", 0, "b"),))),
        # separators
        ("a:1 b:2:f,c:3 , ->\n d:4", Contract((Entry("a", 1), Entry("b", 2, "f"), Entry("c", 3)),
                                              (), (Entry("d", 4),))),
        ("a : 1 : f->b:n + 1", Contract((Entry("a", 1, "f"),), (), (Entry("b", "n+1"),))),
        ("a:1 0:2 ->", Contract((Entry("a", 1), Entry("0", 2)))),
        ("->", Contract()),
        ("a:01 -> b:n+0", Contract((Entry("a", 1),), (), (Entry("b", "n"),))),
    ],
)  # fmt: skip
def test_spellings(text, same_as):
    assert Contract.parse(text) == same_as


@pytest.mark.parametrize(
    "text, message, under",
    [
        ("x:3:f y:2:f", "expected ->", ""),
        ("x:3:f64x -> y:2", "'f64x' is not a dtype; write one of f i", "f64x"),
        ("x:3: -> y:2", "'' is not a dtype", "->"),
        ("x -> y:2", "expected : and the rank of 'x'", "->"),
        ("x:f -> y:2", "'f' is a dtype, and the rank comes first: *:f", "f ->"),
        ("x:nn -> y:2", "'nn' is not a rank", "nn"),
        ("x:3f -> y:2", "'3f' is not a rank", "3f"),
        ("x:65 -> y:2", "65 is not a rank; write a number from 0 to 64", "65"),
        ("x:" + "9" * 5000 + " -> y:2", "is not a rank; write a number from 0 to 64", "9" * 5),
        ("x:n+ -> y:2", "'n+' is not a rank", "n+"),
        ("a:1 -> b:1 -> c:1", "a second ->", "-> c"),
        ("a:1 | x:1 | y:1 -> b:1", "a second | on this side", "| y"),
        ("a:1 a:2 -> b:1", "'a' is already there", "a:2"),
        ("a:1 | ctx.x:1 x:2 -> b:1", "'x' is already there", "x:2"),
        ("a:1 -> 0:1", "an output needs a name", "0:1"),
        ("a:1 | 0:1 -> b:1", "the context has names, not positions", "0:1"),
        ("a.b:1 -> c:1", "only names in the context have dots", "a.b"),
        ("007:1 -> c:1", "without leading zeros", "007"),
        ("größe:1 -> c:1", "'größe' is not a name", "gr??e:1"),
        ("  ", "it is empty", ""),
    ],
)
def test_errors_point_into_the_text(text, message, under):
    with pytest.raises(ContractError) as caught:
        Contract.parse(text)
    first, shown, caret = str(caught.value).split("\n")
    assert message in first
    assert shown[caret.index("^") :].startswith(under)
    assert len(shown) < 100


def test_the_caret_stands_right_in_long_and_multiline_texts():
    text = ", ".join(f"name{n}:2:f" for n in range(40)) + ",\n\tbad:2:q -> y:1"
    with pytest.raises(ContractError) as caught:
        Contract.parse(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^")] == "q"
    assert shown.startswith("  ...")


def test_a_contract_made_by_hand_has_a_spelling_or_is_refused():
    for make in (
        lambda: Entry("a b", 1),
        lambda: Entry("a", -1),
        lambda: Entry("a", "f"),
        lambda: Entry("a", 1, "int"),
        lambda: Contract(inputs=(Entry("a", 1), Entry("a", 2))),
        lambda: Contract(outputs=(Entry("0", 1),)),
    ):
        with pytest.raises(ContractError):
            make()
