"""A pipeline drawn as text: its stages, and on each arrow what there is by then."""

from __future__ import annotations

from collections.abc import Iterable

from ditty_di.processors.chain import LOSS, Arrow, Problem, Report, Stage
from ditty_di.processors.contracts import Contract, Entry


def drawn(report: Report) -> str:
    """The picture. `!` marks what does not fit, `?` what no contract proves."""
    width = max((len(_label(arrow)) for arrow in report.arrows), default=0) + 2
    lines: list[str] = []
    for n, arrow in enumerate(report.arrows):
        lines.append(f"{_label(arrow):{width}}{_told(arrow.stage)}")
        bar = "  │ " if n + 1 < len(report.arrows) and arrow.stage.kind != LOSS else "    "
        lines += [f"{bar}! {_of(p)}" for p in report.problems if p.stage is arrow.stage]
        lines += [f"{bar}? {_of(p)}" for p in report.unproven if p.stage is arrow.stage]
        if arrow.stage.kind != LOSS:
            lines.append(f"{bar}{_flowing(arrow)}".rstrip())
    return "\n".join(lines)


def _label(arrow: Arrow) -> str:
    return f"    - {arrow.stage.name}" if arrow.depth else str(arrow.stage)


def _told(stage: Stage) -> str:
    if stage.contract is not None:
        return str(stage.contract)
    return f"{len(stage.parts)} parts" if stage.parts else "(no contract: unchecked)"


def _of(problem: Problem) -> str:
    return f"{problem.entry}: {problem.message}" if problem.entry else problem.message


def _flowing(arrow: Arrow) -> str:
    flow: Iterable[Entry] = arrow.flow or ()
    side = Contract(outputs=tuple(flow), writes=tuple(arrow.context))
    text = str(side).removeprefix("-> ")
    unknown = "?" if arrow.flow is None else ""
    return " ".join(part for part in (unknown, text) if part and part != "->")
