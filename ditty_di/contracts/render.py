"""Draw a pipeline as text: its stages, and after each what exists there."""

from __future__ import annotations

from ditty_di.contracts.check import Arrow, Problem, Report
from ditty_di.contracts.grammar import Contract
from ditty_di.contracts.stages import LOSS, Stage


def render(report: Report) -> str:
    """Return the pipeline as text; `!` marks what does not fit, `?` what no contract proves.

    Args:
        report: of `ditty_di.contracts.check.examine`.
    """
    width = max((len(_label(arrow)) for arrow in report.arrows), default=0) + 2
    lines: list[str] = []
    for n, arrow in enumerate(report.arrows):
        lines.append(f"{_label(arrow):{width}}{_contract(arrow.stage)}")
        bar = "  │ " if n + 1 < len(report.arrows) and arrow.stage.kind != LOSS else "    "
        for mark, problems in (("!", report.problems), ("?", report.unproven)):
            lines += [f"{bar}{mark} {_text(p)}" for p in problems if p.stage is arrow.stage]
        if arrow.stage.kind != LOSS:
            lines.append(f"{bar}{_behind(arrow)}".rstrip())
    return "\n".join(lines)


def _label(arrow: Arrow) -> str:
    return f"    - {arrow.stage.name}" if arrow.depth else str(arrow.stage)


def _contract(stage: Stage) -> str:
    if stage.contract is not None:
        return str(stage.contract)
    return f"{len(stage.parts)} parts" if stage.parts else "(no contract: unchecked)"


def _text(problem: Problem) -> str:
    return f"{problem.entry}: {problem.message}" if problem.entry else problem.message


def _behind(arrow: Arrow) -> str:
    text = str(Contract(outputs=tuple(arrow.flow or ()), writes=tuple(arrow.context)))
    unknown = "? " if arrow.flow is None else ""
    return f"{unknown}{text.removeprefix('->').lstrip()}"
