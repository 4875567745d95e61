"""Check that the stages of a pipeline fit together, from their contracts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ditty_di.contracts.grammar import DTYPES, MAX_RANK, Contract, ContractError, Entry
from ditty_di.contracts.stages import LOADER, LOSS, MODEL, POST, PRE, Stage
from ditty_di.messages import did_you_mean

#: What the trainer writes into every context.
INITIAL = Contract.parse(
    "-> | original_batch:*, target:*, forward_kwargs:*, epoch:0:i64, step:0:i64, "
    "total_steps:0:i64, device:*, model:*"
).writes
_KWARGS = "forward_kwargs."
_TRAINER = "the trainer"


@dataclass(frozen=True)
class Problem:
    """An entry of a stage's contract that is not provided as it requires."""

    stage: Stage
    entry: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.stage), self.entry, self.message) if part)


@dataclass
class Arrow:
    """What exists behind a stage; `flow` (the batch or output) is None where it is unknown."""

    stage: Stage
    flow: list[Entry] | None
    context: list[Entry]
    depth: int = 0


@dataclass
class Report:
    """The result of a check.

    Attributes:
        problems: entries that do not fit.
        unproven: entries that a stage without a contract may provide.
        unchecked: stages without a contract.
        arrows: what exists behind each stage, in order.
    """

    problems: list[Problem] = field(default_factory=list)
    unproven: list[Problem] = field(default_factory=list)
    unchecked: list[Stage] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)

    def verify(self, *, strict: bool = False) -> None:
        """Raise ContractError with all problems at once.

        Args:
            strict: raise for unproven entries too.
        """
        found = [*self.problems, *(self.unproven if strict else ())]
        if found:
            raise ContractError("\n".join(map(str, found)))


class Letters(dict[str, tuple[int, str]]):
    """The rank of each letter in one stage's contract, and the entry that determined it."""

    def mismatch(self, entry: Entry, rank: int | str, dtype: str | None, source: str) -> str:
        """Return why a tensor does not satisfy an entry, or an empty string.

        Args:
            entry: of the contract.
            rank: of the tensor; a text if it is unknown.
            dtype: of the tensor, as in a contract; None if it is unknown.
            source: the entry in messages.
        """
        letter, more = entry.variable
        if isinstance(rank, int):
            if isinstance(entry.rank, int) and rank != entry.rank:
                return f"needs rank {entry.rank}"
            if letter and rank < more:
                return f"needs rank {more} or more"
            if letter:
                number, by = self.setdefault(letter, (rank - more, source))
                if rank - more != number:
                    return f"needs rank {number + more} because of {by}"
        return "" if compatible(entry.dtype, dtype) else f"needs dtype {entry.dtype}"

    def resolve(self, entry: Entry) -> Entry:
        """Return an entry with its letter replaced by the number, or by `*` if it is unknown."""
        letter, more = entry.variable
        if not letter:
            return entry
        rank = self[letter][0] + more if letter in self else MAX_RANK + 1
        return Entry(entry.name, rank if rank <= MAX_RANK else "*", entry.dtype)


def compatible(a: str | None, b: str | None) -> bool:
    """Return whether some dtype satisfies both; None allows all, other names than ours none."""
    return a is None or b is None or not DTYPES[a].isdisjoint(DTYPES.get(b, ()))


def examine(stages: Iterable[Stage]) -> Report:
    """Follow names through a pipeline.

    A stage without a contract passes on what it gets, unchanged, and may provide more: what is
    taken after it and has no other provider is `unproven`. A model passes on nothing.

    Args:
        stages: from the loader to the loss.
    """
    walk = _Walk()
    for stage in stages:
        walk.visit(stage)
    return walk.report


class _Given(NamedTuple):
    """What is known of a name.

    Its entry (without letters), the stage that gave it, and the number of processors without a
    contract before that.
    """

    entry: Entry
    by: str
    unchecked: int = 0


class _Missing(Exception):
    """No contract provides an entry; unproven where a stage without one may."""

    def __init__(self, message: str, *, unproven: bool = False) -> None:
        super().__init__(message)
        self.unproven = unproven


class _Walk:
    """The state behind the last stage that was visited."""

    def __init__(self) -> None:
        self.report = Report()
        self.flow: dict[str, _Given] = {}  # the batch or output
        self.context = {entry.name: _Given(entry, _TRAINER) for entry in INITIAL}
        # Stages without a contract that may have provided something.
        self.flow_from: list[Stage] = []
        self.context_from: list[Stage] = []

    def visit(self, stage: Stage, depth: int = 0) -> None:
        if stage.error:
            self.report.problems.append(Problem(stage, "", stage.error))
        if stage.contract is not None:
            letters = Letters()
            for entry in stage.contract.inputs:
                self._take(stage, entry, letters, self._flowing)
            for entry in stage.contract.reads:
                self._take(stage, entry, letters, self._in_context, "ctx.")
            self._give(stage, stage.contract, letters)
        elif not stage.parts:
            self.report.unchecked.append(stage)
            if stage.kind in (LOADER, MODEL):
                self.flow, self.flow_from = {}, [stage]
            elif stage.kind in (PRE, POST):
                self.flow_from.append(stage)
                self.context_from.append(stage)
        known = [given.entry for given in self.flow.values()]
        written = [given.entry for given in self.context.values() if given.by != _TRAINER]
        flow = None if self.flow_from and not known else known
        self.report.arrows.append(Arrow(stage, flow, written, depth))
        for part in stage.parts:
            self.visit(part, depth + 1)

    def _give(self, stage: Stage, contract: Contract, letters: Letters) -> None:
        def given(entry: Entry) -> _Given:
            return _Given(letters.resolve(entry), str(stage), len(self.context_from))

        returned = {entry.name: given(entry) for entry in contract.outputs}
        if returned and stage.kind == PRE:
            taken = {self._name(entry) for entry in contract.inputs} | returned.keys()
            self.flow = returned | {k: v for k, v in self.flow.items() if k not in taken}
        elif stage.kind == MODEL or (returned and stage.kind != LOSS):
            self.flow, self.flow_from = returned, []
        for entry in contract.writes:
            self.context[entry.name] = given(entry)
            inner = entry.name.removeprefix(_KWARGS)
            if entry.name.startswith(_KWARGS) and inner in list(self.flow)[1:]:
                del self.flow[inner]  # replaces the loader's

    def _take(
        self,
        stage: Stage,
        entry: Entry,
        letters: Letters,
        provider: Callable[[Stage, Entry], _Given],
        prefix: str = "",
    ) -> None:
        shown = f"{prefix}{entry}"
        try:
            given = provider(stage, entry)
        except _Missing as missing:
            found = self.report.unproven if missing.unproven else self.report.problems
            found.append(Problem(stage, shown, str(missing)))
            return
        if wrong := letters.mismatch(entry, given.entry.rank, given.entry.dtype, str(entry)):
            message = f"{wrong}, but {given.by} gives {given.entry}"
            if through := self.context_from[given.unchecked :]:
                message += f" (if {through[-1]} changes that, its contract has to say so)"
            self.report.problems.append(Problem(stage, shown, message))

    def _name(self, entry: Entry) -> str:
        if not entry.is_position:
            return entry.name
        return dict(enumerate(self.flow)).get(int(entry.name), "")

    def _flowing(self, stage: Stage, entry: Entry) -> _Given:
        """Return what provides an input; raise _Missing."""
        name = self._name(entry)
        before_output = stage.kind in (PRE, MODEL)
        if name in self.flow:
            return self.flow[name]
        if before_output and _KWARGS + name in self.context:
            return self.context[_KWARGS + name]
        _may_come_from(self.flow_from or (self.context_from if before_output else []))
        flows = f"what flows is {_names(self.flow)}"
        if entry.is_position:
            raise _Missing(f"there is no position {entry.name}: {flows}")
        hint = did_you_mean(name, self.flow)
        if name in self.context:
            hint = f"; it is in the context: write it behind a |, as ctx.{name}"
            if stage.kind == MODEL:
                hint = (
                    f"; ctx.{name} does not reach forward: let {self.context[name].by} write "
                    f"ctx.{_KWARGS}{name}"
                )
        raise _Missing(f"nothing before gives {name!r}; {flows}{hint}")

    def _in_context(self, stage: Stage, entry: Entry) -> _Given:
        """Return what provides an entry of the context; raise _Missing."""
        name = entry.name
        if name in self.context:
            return self.context[name]
        container, inner = name.rpartition(".")[0], name.removeprefix(_KWARGS)
        forwarded = name.startswith(_KWARGS)
        if forwarded and inner in list(self.flow)[1:]:
            return self.flow[inner]
        _may_come_from(self.context_from or (self.flow_from if forwarded else []))
        if container in self.context and not forwarded:
            raise _Missing(f"no contract says what is in ctx.{container}", unproven=True)
        hint = did_you_mean(name, self.context)
        if name in self.flow:
            hint = f"; it flows: write it before the |, as {entry}"
        has = f"the context has {_names(self.context)}"
        raise _Missing(f"nothing before writes ctx.{name}; {has}{hint}")


def _may_come_from(stages: list[Stage]) -> None:
    """Raise _Missing if there are stages without a contract that may provide an entry."""
    if stages:
        names = " or ".join(dict.fromkeys(map(str, stages)))
        raise _Missing(f"may come from {names}, which has no contract", unproven=True)


def _names(known: Iterable[str]) -> str:
    return ", ".join(known) or "nothing"
