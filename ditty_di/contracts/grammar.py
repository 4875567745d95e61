"""The grammar of contracts: what a pipeline stage takes and returns, in one line of text.

A contract has two sides, what is taken and what is returned. On each side, entries before a `|` are
the batch (before the model) or the model's output (after it), and entries behind it are in the
context::

    x:3:f -> x:3:f                                takes x, of rank 3, any float; returns the same
    x:3:f | ctx.t:1:i64 -> x:3:f                  reads ctx["t"] as well
    x:3:f -> x:3:f | ctx.t:1:i64                  writes ctx["t"]
    x:n:f | ctx.t:1:i64 -> x:n:f | ctx.noise:n:f  both, for an x of any rank

Grammar, where whitespace and commas separate entries::

    contract = side "->" side
    side     = { entry } [ "|" { entry } ]
    entry    = [ "ctx." ] name ":" rank [ ":" dtype ]
    name     = identifier, in the context also a path of them: ctx.forward_kwargs.t
             | number          among inputs only: a position, 0 to 63
    rank     = number | "*" | letter [ "+" number ]
    dtype    = "f" | "f16" | "bf16" | "f32" | "f64"
             | "i" | "i8" | "i16" | "i32" | "i64" | "u8" | "b"

* An entry behind a `|` is in the context with or without `ctx.`; one with `ctx.` is in the context
  anywhere on its side.
* Rank: the number of dimensions; `*` is any rank, and any object that is not a tensor
  (`ctx.model:*`). A lower-case letter (other than f, i, b) is any rank, but the same one everywhere
  in the contract: `0:n+1:f` with `ctx.target:n:i64` are logits with one dimension more than labels.
* Dtype: omitted is any; `f` is any float (f16 bf16 f32 f64), `i` any signed integer (i8 i16 i32
  i64). A Python bool, int or float has rank 0 and dtype b, i64 or f64, and satisfies `i` and `f`.
* The entries returned are, in their order, the positions of a tuple. A contract that returns only
  context (`-> | ctx.t:1:i64`) leaves the batch or output unchanged. A preprocessor passes on what
  it does not take; a postprocessor returns everything that exists afterwards.
* A name occurs once in each of the four lists.

`str` of a contract is its canonical text, which parses to the same contract.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

#: The dtypes that each dtype of a contract allows.
DTYPES: dict[str, frozenset[str]] = {
    "f": frozenset(("f16", "bf16", "f32", "f64")),
    "i": frozenset(("i8", "i16", "i32", "i64")),
    **{
        name: frozenset((name,))
        for name in ("f16", "bf16", "f32", "f64", "i8", "i16", "i32", "i64", "u8", "b")
    },
}
MAX_RANK = 64  # torch's own limit

# Everything between separators is one entry; `Entry` validates its parts.
_ENTRY = re.compile(
    r"(?=[^\s,|])(?P<name>[^\s,|:]*)\s*"
    r"(?P<typed>:\s*(?P<rank>[^\s,|:+]*(?:\s*\+\s*[^\s,|:]*)?)\s*(?::\s*(?P<dtype>[^\s,|:]*))?)?"
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_POSITION = re.compile(r"[0-9]|[1-5][0-9]|6[0-3]")
_VARIABLE = re.compile(r"(?P<letter>[a-z])(?:\+(?P<more>[1-9][0-9]?))?")
_CONTEXT = "ctx."
_WIDTH = 90  # characters of the contract that an error shows


class ContractError(ValueError):
    """A contract that cannot be parsed, or that a pipeline or a tensor does not satisfy.

    Args:
        message: what is wrong.
        part: the part of an entry that is wrong: name, rank or dtype.
    """

    def __init__(self, message: str, part: str = "name") -> None:
        super().__init__(message)
        self.part = part


@dataclass(frozen=True)
class Entry:
    """One tensor in a contract.

    Args:
        name: its name, or (among inputs) its position as text.
        rank: the number of dimensions, `"*"` for any, or a variable such as `"n"` and `"n+1"`.
        dtype: a key of `DTYPES`; None for any.

    Raises:
        ContractError: one of them cannot be written in a contract.
    """

    name: str
    rank: int | str
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not (self.is_position or _NAME.fullmatch(self.name)):
            # A position has one spelling, so that no name occurs twice in two spellings.
            raise ContractError(
                f"{self.name!r:.40} is not a name; write letters, digits and _, or a position from "
                f"0 to 63 without leading zeros"
            )
        if self.rank in DTYPES:
            raise ContractError(
                f"{self.rank!r} is a dtype, and the rank comes first: *:{self.rank}", "rank"
            )
        letter, more = self.variable
        known = self.rank == "*" or (bool(letter) and more <= MAX_RANK)
        if not (0 <= self.rank <= MAX_RANK if isinstance(self.rank, int) else known):
            raise ContractError(
                f"{self.rank!r:.40} is not a rank; write a number from 0 to {MAX_RANK}, * for any, "
                f"or a letter such as n (or n+1) for the same rank elsewhere",
                "rank",
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ContractError(
                f"{self.dtype!r:.40} is not a dtype; write one of {' '.join(DTYPES)}", "dtype"
            )

    @property
    def is_position(self) -> bool:
        """Whether the name is a position."""
        return _POSITION.fullmatch(self.name) is not None

    @property
    def variable(self) -> tuple[str, int]:
        """Letter and offset of the rank: `("n", 1)` for `"n+1"`, `("", 0)` without a letter."""
        found = _VARIABLE.fullmatch(str(self.rank))
        return (found["letter"], int(found["more"] or 0)) if found else ("", 0)

    def __str__(self) -> str:
        return f"{self.name}:{self.rank}" + (f":{self.dtype}" if self.dtype else "")


@dataclass(frozen=True)
class Contract:
    """The tensors that a stage takes and returns; see the module for the grammar.

    Args:
        inputs: taken from the batch or the model's output.
        reads: taken from the context, names without `ctx.`.
        outputs: returned as the batch or output.
        writes: written into the context, names without `ctx.`.

    Raises:
        ContractError: a name occurs twice, or an entry is not allowed where it is.
    """

    inputs: tuple[Entry, ...] = ()
    reads: tuple[Entry, ...] = ()
    outputs: tuple[Entry, ...] = ()
    writes: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        for side, entries in vars(self).items():
            for n, entry in enumerate(entries):
                if reason := _misplaced(entry, side, entries[:n]):
                    raise ContractError(f"{entry}: {reason}")

    @classmethod
    def parse(cls, text: Any) -> Contract:
        """Parse the text of a contract.

        Args:
            text: see the module for the grammar.

        Raises:
            ContractError: the text is not a contract; shows it with a caret under the mistake.
        """
        if not isinstance(text, str):
            raise ContractError(f"a contract is text such as 'x:3:f -> y:2:f'; got {text!r:.80}")
        left, arrow, right = text.partition("->")
        if not arrow:
            empty = "" if text.strip() else "it is empty; "
            _fail(text, len(text), f"{empty}expected ->, as in x:3:f -> y:2:f")
        start = len(left) + len(arrow)
        if "->" in right:
            _fail(text, text.index("->", start), "a second ->")
        return cls(
            *_parse_side(text, 0, len(left), ("inputs", "reads")),
            *_parse_side(text, start, len(text), ("outputs", "writes")),
        )

    def __str__(self) -> str:
        returned = _side_text(self.outputs, self.writes)
        return f"{_side_text(self.inputs, self.reads)} -> {returned}".strip()


def as_contract(contract: Any) -> Contract | None:
    """Parse a contract unless it is parsed already or None; raise ContractError."""
    return (
        contract if contract is None or isinstance(contract, Contract) else Contract.parse(contract)
    )


def _side_text(flow: tuple[Entry, ...], context: tuple[Entry, ...]) -> str:
    text = ", ".join(map(str, flow))
    behind = ", ".join(f"{_CONTEXT}{entry}" for entry in context)
    return f"{text} | {behind}".strip() if behind else text


def _misplaced(entry: Entry, side: str, before: tuple[Entry, ...]) -> str:
    """Return why an entry is not allowed on a side behind others, or an empty string."""
    if any(entry.name == other.name for other in before):
        return f"{entry.name!r} is already there; write it once"
    if entry.is_position and side == "outputs":
        return "an output needs a name; its index in the list is its position"
    if entry.is_position and side != "inputs":
        return "the context has names, not positions"
    if "." in entry.name and side in ("inputs", "outputs"):
        return "only names in the context have dots; write it behind a |"
    return ""


def _parse_side(
    text: str, start: int, end: int, sides: tuple[str, str]
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Return the entries of `text[start:end]` that flow, and those in the context."""
    bar = text.find("|", start, end)
    if bar < 0:
        bar = end
    if (again := text.find("|", bar + 1, end)) >= 0:
        _fail(text, again, "a second | on this side")
    found: tuple[list[Entry], list[Entry]] = ([], [])
    for match in _ENTRY.finditer(text, start, end):
        if match["typed"] is None:
            _fail(text, match.end(), f"expected : and the rank of {match['name']!r:.40}")
        in_context = match.start() > bar or match["name"].startswith(_CONTEXT)
        entries = found[in_context]
        try:
            name = match["name"].removeprefix(_CONTEXT)
            entry = Entry(name, _canonical_rank(match["rank"]), match["dtype"])
            if reason := _misplaced(entry, sides[in_context], tuple(entries)):
                raise ContractError(reason)
        except ContractError as error:
            _fail(text, match.start(error.part), str(error))
        entries.append(entry)
    return tuple(found[False]), tuple(found[True])


def _canonical_rank(text: str) -> int | str:
    """Return a rank as `Entry` takes it: `"01"` as 1, `"n + 1"` as `"n+1"`, `"n+0"` as `"n"`."""
    text = re.sub(r"\s|(?<![0-9])0+(?=[0-9])", "", text).removesuffix("+0")
    return int(text) if re.fullmatch("[0-9]{1,4}", text) else text


def _fail(text: str, at: int, message: str) -> NoReturn:
    """Raise a ContractError that shows `text` with a caret at an index."""
    # One column a character, so that the caret is under the right one.
    shown = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in text)
    start = max(0, min(at - _WIDTH // 2, len(shown) - _WIDTH))
    cut, more = "..." if start else "", "..." if len(shown) > start + _WIDTH else ""
    caret = " " * (at - start + len(cut)) + "^"
    line = f"{cut}{shown[start : start + _WIDTH]}{more}"
    raise ContractError(f"contract: {message}\n  {line}\n  {caret}")
