"""What a stage takes and gives, in one line of text.

A contract has a side that is taken and a side that is given. On each side, entries before a `|` are
what flows (the batch before the model, its output after it) and entries behind it are in the
context::

    x:3:f -> x:3:f                                takes x, of rank 3, in any float; gives another
    x:3:f | ctx.t:1:i64 -> x:3:f                  reads ctx["t"] as well
    x:3:f -> x:3:f | ctx.t:1:i64                  writes ctx["t"]
    x:n:f | ctx.t:1:i64 -> x:n:f | ctx.noise:n:f  both, for an x of any rank

Grammar, whitespace and commas separating entries alike::

    contract = side "->" side
    side     = { entry } [ "|" { entry } ]
    entry    = [ "ctx." ] name ":" rank [ ":" dtype ]
    name     = identifier, in the context also a path of them: ctx.forward_kwargs.t
             | number          taken only: the position in what flows, 0 to 63
    rank     = number | "*" | letter [ "+" number ]
    dtype    = "f" | "f16" | "bf16" | "f32" | "f64"
             | "i" | "i8" | "i16" | "i32" | "i64" | "u8" | "b"

* An entry behind a `|` is in the context with or without `ctx.`; one with `ctx.` is in the context
  wherever it stands on its side.
* Rank: the number of dimensions; `*` is any, and also what is no tensor (`ctx.model:*`). A lower
  case letter (other than f, i, b) is any rank, but the same wherever it occurs in the contract:
  `0:n+1:f` with `ctx.target:n:i64` are logits with one dimension more than their labels.
* Dtype: none is any; `f` is any float (f16 bf16 f32 f64), `i` any signed integer (i8 i16 i32 i64).
  A Python bool, int or float has rank 0 and dtype b, i64 or f64, and satisfies `i` and `f`.
* Entries given, in their order, are the positions of a tuple. A contract that gives nothing but
  context (`-> | ctx.t:1:i64`) leaves what flows as it is. What a preprocessor does not take passes
  by it; what a postprocessor gives is everything that there is afterwards.
* A name occurs once in each of the four places.

`str` of a contract is its canonical spelling, which parses to the same contract.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

#: What a dtype in a contract stands for.
DTYPES: dict[str, frozenset[str]] = {
    "f": frozenset(("f16", "bf16", "f32", "f64")),
    "i": frozenset(("i8", "i16", "i32", "i64")),
    **{name: frozenset((name,)) for name in ("f16", "bf16", "f32", "f64")},
    **{name: frozenset((name,)) for name in ("i8", "i16", "i32", "i64", "u8", "b")},
}
MAX_RANK = 64  # torch's own limit

_TOKEN = re.compile(
    r"(?P<space>[\s,]+)|(?P<arrow>->)|(?P<mark>[|:*+])"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)|(?P<number>[0-9]+)"
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_POSITION = re.compile(r"[0-9]|[1-5][0-9]|6[0-3]")
_RANK = re.compile(r"(?P<letter>[a-z])(\+(?P<more>[1-9][0-9]?))?")
_CONTEXT = "ctx."
_WIDTH = 90  # of the text that an error shows


class ContractError(ValueError):
    """A contract that cannot be read, or that what there is does not satisfy."""


@dataclass(frozen=True)
class Entry:
    """One name in a contract; `rank` is a number, `"*"`, or a letter as in `"n"` and `"n+1"`.

    Raises:
        ContractError: something of it has no spelling in a contract.
    """

    name: str
    rank: int | str
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not (self.is_position or _NAME.fullmatch(self.name)):
            # A position is written one way alone, so that no name occurs twice in two spellings.
            raise ContractError(f"{self.name!r} is no name; write letters, digits and _")
        if isinstance(self.rank, int):
            if not 0 <= self.rank <= MAX_RANK:
                raise ContractError(f"rank {self.rank}: tensors have 0 to {MAX_RANK} dimensions")
        elif self.rank != "*":
            letter, more = self.variable
            if not letter or letter in DTYPES or more > MAX_RANK:
                raise ContractError(f"{self.rank!r} is no rank; {_RANKS}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ContractError(f"{self.dtype!r} is no dtype; {_DTYPES}")

    @property
    def is_position(self) -> bool:
        """Whether the name is a position in what flows."""
        return _POSITION.fullmatch(self.name) is not None

    @property
    def variable(self) -> tuple[str, int]:
        """`("n", 1)` for the rank `"n+1"`; `("", 0)` for a rank without a letter."""
        found = _RANK.fullmatch(str(self.rank))
        return (found["letter"], int(found["more"] or 0)) if found else ("", 0)

    def __str__(self) -> str:
        return f"{self.name}:{self.rank}" + (f":{self.dtype}" if self.dtype else "")


_RANKS = "write a number, * for any, or a letter such as n (or n+1) for the same rank elsewhere"
_DTYPES = f"write one of {' '.join(DTYPES)}"


@dataclass(frozen=True)
class Contract:
    """What a stage takes and gives; see the module for the grammar.

    `reads` and `writes` are in the context, their names without `ctx.`.

    Raises:
        ContractError: a name occurs twice in one place, or a position where there is none.
    """

    inputs: tuple[Entry, ...] = ()
    reads: tuple[Entry, ...] = ()
    outputs: tuple[Entry, ...] = ()
    writes: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        for entries, flows, taken in (
            (self.inputs, True, True),
            (self.reads, False, True),
            (self.outputs, True, False),
            (self.writes, False, False),
        ):
            for n, entry in enumerate(entries):
                if reason := _misplaced(entry, entries[:n], flows=flows, taken=taken):
                    raise ContractError(f"{entry}: {reason}")

    @classmethod
    def parse(cls, text: Any) -> Contract:
        """The contract that a text means.

        Raises:
            ContractError: and nothing else; it shows the text with a caret under what is wrong.
        """
        if not isinstance(text, str):
            raise ContractError(f"a contract is text such as 'x:3:f -> y:2:f'; got {text!r:.80}")
        return _Parser(text).contract()

    def __str__(self) -> str:
        given = _side(self.outputs, self.writes)
        return f"{_side(self.inputs, self.reads)} -> {given}".strip()


def _side(flowing: tuple[Entry, ...], context: tuple[Entry, ...]) -> str:
    text = ", ".join(map(str, flowing))
    behind = ", ".join(f"{_CONTEXT}{entry}" for entry in context)
    return f"{text} | {behind}".strip() if behind else text


def _misplaced(entry: Entry, before: tuple[Entry, ...], *, flows: bool, taken: bool) -> str:
    """Why an entry cannot stand where it does; empty when it can."""
    if entry.name in (other.name for other in before):
        return f"{entry.name!r} is there already; write it once"
    if entry.is_position and not flows:
        return "the context has names and no positions"
    if entry.is_position and not taken:
        return "what is given needs a name; its place in the list is its position"
    if flows and "." in entry.name:
        return "only names in the context have dots; write it behind a |"
    return ""


@dataclass(frozen=True)
class _Token:
    kind: str  # name, number, arrow, mark, or end
    text: str
    at: int


class _Parser:
    """Recursive descent over the grammar in the module's docstring."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[_Token] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                self._fail(f"{text[at]!r} means nothing in a contract", at)
            if found.lastgroup == "name" and text[at - 1 : at].isdecimal():
                self._fail(
                    f"{found[0]!r} right behind a number; put a space or a comma between", at
                )
            if found.lastgroup != "space":
                self._tokens.append(_Token(str(found.lastgroup), found[0], at))
            at = found.end()
        self._tokens.append(_Token("end", "", len(text)))
        self._next = 0

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._token
        self._next += token.kind != "end"
        return token

    def _accept(self, text: str) -> bool:
        if self._token.text != text or self._token.kind not in ("mark", "arrow"):
            return False
        self._take()
        return True

    def contract(self) -> Contract:
        if len(self._tokens) == 1:
            self._fail("it is empty; write for example x:3:f -> y:2:f", 0)
        inputs, reads = self._side(taken=True)
        if not self._accept("->"):
            self._fail("expected another entry or ->", self._token.at)
        outputs, writes = self._side(taken=False)
        if self._token.kind != "end":
            again = "a second ->" if self._token.text == "->" else repr(self._token.text)
            self._fail(f"{again} where an entry or the end should be", self._token.at)
        return Contract(inputs, reads, outputs, writes)

    def _side(self, *, taken: bool) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        places: dict[bool, tuple[Entry, ...]] = {True: (), False: ()}  # by whether it flows
        behind = False
        while True:
            if self._accept("|"):
                if behind:
                    self._fail("a second | on this side", self._tokens[self._next - 1].at)
                behind = True
            elif self._token.kind in ("name", "number"):
                first = self._token
                entry, in_context = self._entry()
                flows = not (behind or in_context)
                if reason := _misplaced(entry, places[flows], flows=flows, taken=taken):
                    self._fail(reason, first.at)
                places[flows] += (entry,)
            else:
                return places[True], places[False]

    def _entry(self) -> tuple[Entry, bool]:
        name = self._take()
        if name.kind == "number" and not _POSITION.fullmatch(name.text):
            self._fail("a position is a number from 0 to 63, without zeros before it", name.at)
        in_context = name.text.startswith(_CONTEXT)
        if not self._accept(":"):
            self._fail(f"expected : and the rank of {name.text!r}", self._token.at)
        rank = self._rank()
        dtype = None
        if self._accept(":"):
            token = self._take()
            if token.kind != "name" or token.text not in DTYPES:
                found = f"{token.text!r} is no dtype" if token.text else "expected a dtype"
                self._fail(f"{found}; {_DTYPES}", token.at)
            dtype = token.text
        return Entry(name.text.removeprefix(_CONTEXT), rank, dtype), in_context

    def _rank(self) -> int | str:
        token = self._take()
        if token.kind == "number":
            return self._number(token)
        if token.kind == "mark" and token.text == "*":
            return "*"
        if token.text in DTYPES:
            self._fail(
                f"{token.text!r} is a dtype, and the rank comes first: *:{token.text}", token.at
            )
        if token.kind != "name" or not _RANK.fullmatch(token.text):
            found = f"{token.text!r} is no rank" if token.text else "expected a rank"
            self._fail(f"{found}; {_RANKS}", token.at)
        if not self._accept("+"):
            return token.text
        more = self._take()
        if more.kind != "number":
            self._fail(f"expected a number after {token.text}+", more.at)
        number = self._number(more)
        return f"{token.text}+{number}" if number else token.text

    def _number(self, token: _Token) -> int:
        digits = token.text.lstrip("0") or "0"
        if len(digits) > 2 or int(digits) > MAX_RANK:
            self._fail(f"tensors have 0 to {MAX_RANK} dimensions", token.at)
        return int(digits)

    def _fail(self, message: str, at: int) -> NoReturn:
        # One column a character, so that the caret stands where it should.
        shown = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in self._text)
        start = max(0, min(at - _WIDTH // 2, len(shown) - _WIDTH))
        cut = "..." if start else ""
        shown = cut + shown[start : start + _WIDTH] + ("..." if len(shown) > start + _WIDTH else "")
        caret = " " * (at - start + len(cut)) + "^"
        raise ContractError(f"contract: {message}\n  {shown}\n  {caret}")
