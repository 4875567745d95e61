"""One page about a trace of torch's profiler: operators, idle time, exposed communication."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditty_di.io import write_text

log = logging.getLogger(__name__)

#: A start and an end, in microseconds.
Span = tuple[float, float]

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
#: Kernels of NCCL and RCCL; operators of torch.distributed, and what gloo's threads record.
_COMMUNICATION = re.compile(r"nccl|rccl|gloo:|c10d|record_param_comms", re.IGNORECASE)


@dataclass
class Summary:
    """Summary of a trace; times in microseconds.

    Attributes:
        window: length of the traced steps, until the last kernel of theirs has ended.
        busy: time in which at least one thing computed: a kernel, or an operator on a CPU.
        gap: the longest time in which nothing did.
        communication: time in which at least one collective ran.
        exposed: of it, time in which nothing computed.
        kernels: time by name; empty for a trace without a device.
        collectives: time by name, of kernels on a device, else of what the host recorded.
        operators: time by name of what ran on the host, without that of operators inside.
        calls: number of events by name.
    """

    window: float = 0.0
    busy: float = 0.0
    gap: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return one page of text."""
        window = self.window or 1.0
        lines = [
            f"window                  {self.window / 1000:10.3f} ms",
            f"computing               {self._line(self.busy)}",
            f"idle                    {self._line(self.window - self.busy)}"
            f", at most {self.gap / 1000:.3f} ms at a time",
            f"communication           {self._line(self.communication)}",
            f"  of it exposed         {self._line(self.exposed)}",
        ]
        for title, times, most in (
            ("kernels", self.kernels, 15),
            ("collectives", self.collectives, 8),
            ("operators on the host, own time", self.operators, 15),
        ):
            if times:
                lines += ["", f"{'ms':>10}  {'share':>6}  {'calls':>6}  {title}"]
            for name, time in times.most_common(most):
                share, calls = time / window, self.calls[name]
                lines.append(f"{time / 1000:10.3f}  {share:6.1%}  {calls:6}  {name[:100]}")
        return "\n".join(lines) + "\n"

    def _line(self, time: float) -> str:
        return f"{time / 1000:10.3f} ms  {time / (self.window or 1.0):6.1%}"


def summarize(events: Iterable[dict[str, Any]]) -> Summary:
    """Return what complete events of a Chrome trace tell.

    With kernels of a device, these are what computes. Without, operators on the host are, in the
    time that is their own; what waits for a collective does not compute.

    Args:
        events: `traceEvents` of the file.
    """
    spans = [e for e in events if e.get("ph") == "X" and float(e.get("dur", 0)) > 0]
    on_device = [e for e in spans if e.get("cat") in _ON_DEVICE]
    operators = [e for e in spans if e.get("cat") == "cpu_op"]
    noted = [e for e in spans if e.get("cat") == "user_annotation"]  # gloo's collectives too
    steps = [_span(e) for e in noted if e["name"].startswith("ProfilerStep")]
    collectives = [e for e in on_device or [*operators, *noted] if _communicates(e)]
    own = _own_spans(operators)
    computing = [(e, [_span(e)]) for e in on_device] or own
    everything = steps or [_span(e) for e in spans]
    if not everything:
        return Summary()
    begin, end = min(s for s, _ in everything), max(e for _, e in everything)
    end = max([end, *(_span(e)[1] for e in on_device)])

    def within(found: Iterable[Span]) -> list[Span]:
        return _merged((max(s, begin), min(e, end)) for s, e in found)

    works = within(s for e, found in computing if not _communicates(e) for s in found)
    speaks = within(_span(e) for e in collectives)
    edges = [begin, *(x for span in works for x in span), end]
    gaps = [after - before for before, after in zip(edges[::2], edges[1::2], strict=True)]
    summary = Summary(
        window=end - begin,
        busy=_length(works),
        gap=max(gaps),
        communication=_length(speaks),
        exposed=_length(_merged([*works, *speaks])) - _length(works),
    )
    for times, events_of in ((summary.kernels, on_device), (summary.collectives, collectives)):
        for event in events_of:
            times[event["name"]] += event["dur"]
    for event, found in own:
        summary.operators[event["name"]] += _length(found)  # type: ignore[assignment]
    summary.calls.update(event["name"] for event in (*on_device, *operators, *noted))
    return summary


def write_summary(trace: str) -> None:
    """Write the summary of a trace beside it, as `NAME.txt`; only warn where that fails.

    Args:
        trace: the file that the profiler wrote, `NAME.json` or `NAME.json.gz`.
    """
    path = Path(trace)
    read: Any = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz").removesuffix(".json")
    try:
        with read(path, "rt", encoding="utf-8") as file:
            summary = summarize(json.load(file)["traceEvents"])
        write_text(path.with_name(f"{name}.txt"), f"{path.name}\n\n{summary}")
    except Exception as error:  # a page of text must not end a training
        log.warning("no summary of the trace %s (%s: %s)", path, type(error).__name__, error)


def _span(event: dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _communicates(event: dict[str, Any]) -> bool:
    return _COMMUNICATION.search(event["name"]) is not None


def _own_spans(events: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Span]]]:
    """Return each event with the parts of its time that no event inside of it covers."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    found = []
    for of_thread in threads.values():
        inside: dict[int, list[Span]] = defaultdict(list)
        open_events: list[tuple[float, int]] = []
        ordered = sorted(of_thread, key=lambda e: (e["ts"], -e["dur"]))
        for i, event in enumerate(ordered):
            start, end = _span(event)
            while open_events and open_events[-1][0] <= start:
                open_events.pop()
            if open_events:
                inside[open_events[-1][1]].append((start, end))
            open_events.append((end, i))
        for i, event in enumerate(ordered):
            start, end = _span(event)
            own = []
            for s, e in _merged(inside[i]):
                own.append((start, s))
                start = max(start, e)
            found.append((event, [(s, e) for s, e in [*own, (start, end)] if e > s]))
    return found


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Return the union of spans, in order and without overlap."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
