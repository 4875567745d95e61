"""Costs of one rank: those of its stages together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ditty_di.planning.layers import Counts
from ditty_di.planning.meter import DATA_PARALLEL, KINDS
from ditty_di.planning.schedule import in_flight
from ditty_di.planning.stage import WHEN, Step


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Costs of a rank of one pipeline position: bytes, operations and seconds of a step.

    Args:
        stages: numbers of its stages.
        exact: bytes of `parameters`, `buffers`, `gradients`, `optimizer`, `checkpoint`.
        peak: bytes at the moment with the most, by kind (`ditty_di.planning.meter.KINDS`).
        moment: that moment.
        flops: floating-point operations.
        traffic: bytes by collective, group and link.
        compute: seconds of operations.
        exposed: seconds of collectives that delay operations.
        overlapped: seconds of collectives that run beside them.
        update: seconds of the update.
    """

    stages: list[int]
    exact: dict[str, int]
    peak: dict[str, float]
    moment: str
    flops: float
    traffic: dict[str, float]
    compute: float
    exposed: float
    overlapped: float
    update: float

    @property
    def bytes(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak.values())


def combine(steps: Mapping[int, Step], passes: Iterable[tuple[int, str]]) -> RankPlan:
    """Return the plan of a rank from those of its stages.

    While one stage runs, the others keep their parameters and gradients, and all keep what their
    micro-batches in flight hold.

    Args:
        steps: of its stages, by number.
        passes: see `ditty_di.planning.schedule`.
    """
    exact: Counter[str] = Counter()
    counts: Counts = Counter()
    for step in steps.values():
        exact.update(step.exact)
        counts.update(step.counts)
    flying = in_flight(passes, {i: step.held for i, step in steps.items()})
    moments: dict[str, Counter[str]] = {}
    for i, step in steps.items():
        always = Counter(optimizer=exact["optimizer"])
        for other in (other for j, other in steps.items() if j != i):
            always += other.kept
        flight = Counter(activations=max(0, int(flying - step.held)))
        for (when, moment), live in step.moments.items():
            stage = f"stage {i}" if len(steps) > 1 else ""
            name = ", ".join(filter(None, (stage, WHEN[when], moment)))
            moments[name] = live + always + (Counter() if when == "update" else flight)
    peak = max(moments, key=lambda moment: moments[moment].total())
    traffic: Counts = Counter()
    flops = update = 0.0
    for (when, what, *key), n in counts.items():
        flops += n if what == "flop" else 0
        update += n if when == "update" and what in ("seconds", "transfer") else 0
        if what == "traffic":
            traffic[key[0]] += n
    forward, backward = (pass_seconds(counts, way) for way in ("forward", "backward"))
    return RankPlan(
        stages=list(steps),
        exact=dict(exact),
        peak={kind: moments[peak][kind] for kind in KINDS if moments[peak][kind] > 0},
        moment=peak,
        flops=flops,
        traffic=dict(traffic),
        compute=forward.compute + backward.compute,
        exposed=forward.exposed + backward.exposed,
        overlapped=forward.overlapped + backward.overlapped,
        update=update,
    )


class Seconds(NamedTuple):
    """Seconds of the passes of a step.

    Args:
        compute: of operations.
        exposed: of collectives that delay operations.
        overlapped: of collectives that run beside them.
    """

    compute: float
    exposed: float
    overlapped: float

    @property
    def total(self) -> float:
        """Seconds until all of it is done."""
        return max(self.compute + self.exposed, self.overlapped)


def pass_seconds(counts: Counts, way: str) -> Seconds:
    """Return the seconds of all forward or all backward passes of a step.

    Args:
        counts: of `Step`.
        way: `forward` or `backward`.
    """
    sent = {
        key[2]: n for key, n in counts.items() if key[:2] == ("batch", "transfer") and key[3] == way
    }
    beside = sum(n for group, n in sent.items() if group in (*DATA_PARALLEL, "pp"))
    return Seconds(counts["batch", "seconds", way], sum(sent.values()) - beside, beside)
