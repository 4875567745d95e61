"""Whether the stages of a pipeline fit together, from their contracts alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ditty_di.config.targets import did_you_mean
from ditty_di.processors.contracts import DTYPES, MAX_RANK, Contract, ContractError, Entry

#: What the trainer writes into every context.
INITIAL = Contract.parse(
    "-> | original_batch:*, target:*, forward_kwargs:*, epoch:0:i64, step:0:i64, "
    "total_steps:0:i64, device:*, model:*"
).writes
LOADER, PRE, MODEL, POST, LOSS = "loader", "preprocessor", "model", "postprocessor", "loss"
_KWARGS = "forward_kwargs."
_TRAINER = "the trainer"


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Args:
        kind: loader, preprocessor, model, postprocessor or loss.
        name: for people.
        contract: None is unchecked, unless the stage consists of `parts` that have some.
        parts: of a composite loss; each takes what the whole takes.
        key: where in a configuration it is written.
        error: why its contract cannot be read.
    """

    kind: str
    name: str
    contract: Contract | None = None
    parts: tuple[Stage, ...] = ()
    key: str = ""
    error: str = ""

    def __str__(self) -> str:
        return self.kind if self.name.lower() in ("", self.kind) else f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Problem:
    """An entry of a stage's contract that is not provided as it says."""

    stage: Stage
    entry: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.stage), self.entry, self.message) if part)


@dataclass(frozen=True)
class Given:
    """What is known of a name: its entry (no letter as rank), who gave it, and how many processors
    without a contract were before."""

    entry: Entry
    by: str
    unchecked: int = 0


@dataclass
class Arrow:
    """What there is behind a stage. `None` for what flows: nobody knows."""

    stage: Stage
    flow: list[Entry] | None
    context: list[Entry]
    depth: int = 0


@dataclass
class Report:
    """What was found about a pipeline.

    `unproven` are entries that may come from a stage without a contract; `unchecked` are those
    stages; `arrows` are what there is behind each stage, in order.
    """

    problems: list[Problem] = field(default_factory=list)
    unproven: list[Problem] = field(default_factory=list)
    unchecked: list[Stage] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)

    def verify(self, *, strict: bool = False) -> None:
        """Raises ContractError with all problems at once; `strict`, with what is unproven too."""
        found = [*self.problems, *(self.unproven if strict else ())]
        if found:
            raise ContractError("\n".join(map(str, found)))


def examine(stages: Iterable[Stage]) -> Report:
    """Follows names through the stages, from the loader to the loss.

    A stage without a contract passes on what it got, as it got it, and may give more: what is taken
    behind it and has no other provider is `unproven`. A model passes on nothing.
    """
    chain = _Chain()
    for stage in stages:
        chain.go(stage)
    return chain.report


class _Chain:
    def __init__(self) -> None:
        self.report = Report()
        self.flow: dict[str, Given] = {}
        self.context = {entry.name: Given(entry, _TRAINER) for entry in INITIAL}
        self.flow_from: list[Stage] = []  # unchecked: they may have given what flows
        self.context_from: list[Stage] = []
        self._ranks: dict[str, tuple[int, str]] = {}

    def go(self, stage: Stage, depth: int = 0) -> None:
        self._ranks = {}
        if stage.error:
            self.report.problems.append(Problem(stage, "", stage.error))
        if stage.contract is None and not stage.parts:
            self.report.unchecked.append(stage)
            self._pass(stage)
        if stage.contract is not None:
            self._take(stage, stage.contract)
            self._give(stage, stage.contract)
        known = [g.entry for g in self.flow.values()]
        written = [g.entry for g in self.context.values() if g.by != _TRAINER]
        flow = None if self.flow_from and not known else known
        self.report.arrows.append(Arrow(stage, flow, written, depth))
        before = dict(self.flow), list(self.flow_from)
        for part in stage.parts:
            self.flow, self.flow_from = dict(before[0]), list(before[1])
            self.go(part, depth + 1)

    # ------------------------------------------------------------------------------- giving
    def _pass(self, stage: Stage) -> None:
        """What an unchecked stage may do."""
        if stage.kind in (LOADER, MODEL):
            self.flow, self.flow_from = {}, [stage]
        elif stage.kind in (PRE, POST):
            self.flow_from.append(stage)
            self.context_from.append(stage)

    def _give(self, stage: Stage, contract: Contract) -> None:
        given = {entry.name: self._given(stage, entry) for entry in contract.outputs}
        if given and stage.kind != LOSS:
            rest: dict[str, Given] = {}
            if stage.kind == PRE:
                taken = {self._name(entry) for entry in contract.inputs}
                rest = {k: v for k, v in self.flow.items() if k not in taken and k not in given}
            else:
                self.flow_from = []
            self.flow = {**given, **rest}
        elif stage.kind == MODEL:
            self.flow, self.flow_from = {}, []
        for entry in contract.writes:
            self.context[entry.name] = self._given(stage, entry)
            inner = entry.name.removeprefix(_KWARGS)
            if entry.name.startswith(_KWARGS) and inner in list(self.flow)[1:]:
                del self.flow[inner]  # the loader's, which this replaces

    def _given(self, stage: Stage, entry: Entry) -> Given:
        """With a number in place of a letter, where what was taken tells it."""
        letter, more = entry.variable
        if letter:
            known = letter in self._ranks and self._ranks[letter][0] + more <= MAX_RANK
            rank = self._ranks[letter][0] + more if known else "*"
            entry = Entry(entry.name, rank, entry.dtype)
        return Given(entry, str(stage), len(self.context_from))

    # ------------------------------------------------------------------------------- taking
    def _take(self, stage: Stage, contract: Contract) -> None:
        for entry in contract.inputs:
            self._found(stage, entry, str(entry), self._flowing(stage, entry))
        for entry in contract.reads:
            self._found(stage, entry, f"ctx.{entry}", self._in_context(stage, entry))

    def _found(self, stage: Stage, entry: Entry, shown: str, given: Given | str | None) -> None:
        """`given`: what is known of it, why it is not there, or None for nobody knows."""
        if given is None:
            return
        message = given if isinstance(given, str) else self._mismatch(entry, given)
        if message:
            self.report.problems.append(Problem(stage, shown, message))

    def _name(self, entry: Entry) -> str:
        if not entry.is_position:
            return entry.name
        n = int(entry.name)
        return list(self.flow)[n] if n < len(self.flow) else ""

    def _flowing(self, stage: Stage, entry: Entry) -> Given | str | None:
        name = self._name(entry)
        if name in self.flow:
            return self.flow[name]
        before_output = stage.kind in (PRE, MODEL)
        if before_output and _KWARGS + name in self.context:
            return self.context[_KWARGS + name]
        if self.flow_from:
            return self._unproven(stage, str(entry), self.flow_from)
        if before_output and self.context_from:
            return self._unproven(stage, str(entry), self.context_from)
        flows = f"what flows is {_names(self.flow)}"
        if entry.is_position:
            return f"there is no position {entry.name}: {flows}"
        hint = did_you_mean(name, self.flow)
        if stage.kind == MODEL and name in self.context:
            hint = (
                f"; ctx.{name} does not reach forward: let {self.context[name].by} write "
                f"ctx.{_KWARGS}{name}"
            )
        elif name in self.context:
            hint = f"; it is in the context: write it behind a |, as ctx.{name}"
        return f"nothing before gives {name!r}; {flows}{hint}"

    def _in_context(self, stage: Stage, entry: Entry) -> Given | str | None:
        name = entry.name
        if name in self.context:
            return self.context[name]
        container = name.rpartition(".")[0]
        inner = name.removeprefix(_KWARGS)
        if inner in list(self.flow)[1:] and name.startswith(_KWARGS):
            return self.flow[inner]
        if self.context_from:
            return self._unproven(stage, f"ctx.{entry}", self.context_from)
        if name.startswith(_KWARGS) and self.flow_from:
            return self._unproven(stage, f"ctx.{entry}", self.flow_from)
        if container in self.context and not name.startswith(_KWARGS):
            self.report.unproven.append(
                Problem(stage, f"ctx.{entry}", f"no contract says what is in ctx.{container}")
            )
            return None
        hint = did_you_mean(name, self.context)
        if name in self.flow:
            hint = f"; it flows: write it before the |, as {entry}"
        return f"nothing before writes ctx.{name}; the context has {_names(self.context)}{hint}"

    def _unproven(self, stage: Stage, shown: str, by: list[Stage]) -> Given | None:
        who = " or ".join(dict.fromkeys(map(str, by)))
        message = f"may come from {who}, which has no contract"
        self.report.unproven.append(Problem(stage, shown, message))
        return None

    def _mismatch(self, entry: Entry, given: Given) -> str:
        there = f"{given.by} gives {given.entry}"
        if through := self.context_from[given.unchecked :]:
            there += f" (if {through[-1]} changes that, its contract has to say so)"
        rank, wanted = given.entry.rank, entry.rank
        letter, more = entry.variable
        if isinstance(rank, int):
            if isinstance(wanted, int) and rank != wanted:
                return f"needs rank {wanted}, but {there}"
            if letter and rank < more:
                return f"needs rank {more} or more, but {there}"
            if letter:
                number, by = self._ranks.setdefault(letter, (rank - more, str(entry)))
                if rank - more != number:
                    return f"needs rank {number + more} because of {by}, but {there}"
        if not compatible(entry.dtype, given.entry.dtype):
            return f"needs dtype {entry.dtype}, but {there}"
        return ""


def compatible(a: str | None, b: str | None) -> bool:
    """Whether there is a dtype that both allow; None allows all."""
    return a is None or b is None or not DTYPES[a].isdisjoint(DTYPES[b])


def _names(known: Iterable[str]) -> str:
    return ", ".join(known) or "nothing"


def flattened(stages: Iterable[Stage]) -> Iterator[Stage]:
    """The stages, each before its parts."""
    for stage in stages:
        yield stage
        yield from flattened(stage.parts)
