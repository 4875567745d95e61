"""A plan as a page of text, and as values for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ditty_di.planning.device import GIB
from ditty_di.planning.meter import KINDS
from ditty_di.planning.planner import Plan

#: Settings that reduce each kind of memory.
ADVICE = {
    "parameters": "more ranks with parallelize=fsdp, or runtime.tp or runtime.pp; a base that is "
    "frozen and packed (quantize=nf4 adapter=lora)",
    "gradients": "fewer micro-batches, between which gradients stay whole: a larger "
    "data.loader.micro_batch_size, or a smaller global_batch_size; or more ranks",
    "optimizer": "optimizer=adamw_8bit, an adapter, or more ranks with parallelize=fsdp",
    "activations": "activation_checkpointing=full; a smaller data.loader.micro_batch_size or "
    "data.seq_len; runtime.tp",
    "head and loss": "loss=chunked, or a smaller data.loader.micro_batch_size",
    "gathered parameters": "runtime.tp, which splits what FSDP gathers",
    "communication": "runtime.tp, which splits what FSDP sends",
    "temporary": "loss=chunked, or a smaller data.loader.micro_batch_size",
}
_FEW = 4  # pipeline positions on the page


def text(plan: Plan) -> str:
    """Return a plan as a page of text."""
    device, shown = plan.device, _shown(plan)
    name, unit = ("GiB", GIB) if plan.worst.bytes >= GIB else ("MiB", GIB >> 10)
    layout = "".join(f", {name} {degree}" for name, degree in plan.layout.items())
    rows = f"{plan.micro_batches} x {plan.rows} rows"
    rows += f" of {plan.tokens // plan.rows} tokens" if plan.tokens > plan.rows else ""
    ranks = [plan.positions[n] for n in shown]
    sent = {
        key: size for rank in ranks for key, size in rank.traffic.items() if size >= unit / 1000
    }
    lines = [f"{plan.world_size} x {device.name}{layout}: {rows} a rank and step", ""]
    lines += _table(
        [
            (name, [f"position {n}" if len(ranks) > 1 else "a rank" for n in shown]),
            *(
                (kind, [rank.exact[kind] / unit for rank in ranks])
                for kind in ("parameters", "gradients", "optimizer", "buffers")
            ),
            ("at the peak", []),
            *((f"  {kind}", [rank.peak.get(kind, 0.0) / unit for rank in ranks]) for kind in KINDS),
            ("  together", [rank.bytes / unit for rank in ranks]),
            ("a step", []),
            ("  TFLOP", [rank.flops / 1e12 for rank in ranks]),
            *(
                (f"  {name} of {key}", [rank.traffic.get(key, 0.0) / unit for rank in ranks])
                for key in sorted(sent)
            ),
            ("  s of operations", [rank.compute for rank in ranks]),
            ("  s of collectives in between", [rank.exposed for rank in ranks]),
            ("  s of collectives beside them", [rank.overlapped for rank in ranks]),
            ("  s of the update", [rank.update for rank in ranks]),
        ]
    )
    lines += [
        "",
        f"the peak is in {plan.worst.moment}",
        f"{'fits' if plan.fits else 'does not fit'}: {plan.worst.bytes / GIB:.2f} GiB of "
        f"{device.usable / GIB:.2f}, which is {device.memory_gib:g} less {device.headroom:.0%}",
        *_active(plan),
        f"a checkpoint has {plan.checkpoint / unit:.2f} {name}",
        f"about {plan.seconds:.3g} s a step and {plan.tokens_per_second:,.0f} tokens/s, at "
        f"{device.efficiency:.0%} of the peaks",
        *(f"note: {note}" for note in plan.notes),
        *(f"change first: {advice}" for advice in change_first(plan)),
    ]
    return "\n".join(lines)


def _active(plan: Plan) -> Iterator[str]:
    """Yield how many parameters a token uses, if not all."""
    total, active = plan.parameters, plan.active_parameters
    if active < total:
        yield f"{total:,} parameters, {active:,} of them active for a token"


def _shown(plan: Plan) -> list[int]:
    """Return the pipeline positions on the page: all if they are few, else ends and worst."""
    positions = range(len(plan.positions))
    if len(positions) <= _FEW:
        return list(positions)
    return sorted({0, 1, plan.positions.index(plan.worst), positions[-1]})


def _table(rows: Iterable[tuple[str, list[Any]]]) -> Iterator[str]:
    """Yield lines with one column for each rank; rows of zeros are left out."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 1
    for name, values in rows:
        cells = [v if isinstance(v, str) else f"{v:.3f}" for v in values]
        if not cells or any(cell != "0.000" for cell in cells):
            yield (f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells)).rstrip()


def change_first(plan: Plan) -> list[str]:
    """Return what to change first: for memory if it does not fit, else for speed."""
    worst = plan.worst
    if not plan.fits:
        largest = sorted(worst.peak, key=lambda kind: -worst.peak[kind])
        by_advice = {ADVICE[kind]: kind for kind in reversed(largest) if kind in ADVICE}
        return [f"{kind}: {advice}" for advice, kind in list(by_advice.items())[:-3:-1]]
    slowest = max(plan.positions, key=lambda rank: rank.compute + rank.exposed)
    passes = sum(rank.compute + rank.exposed for rank in plan.positions) / len(plan.positions)
    found = {
        "FSDP sends for longer than it computes: more tokens in a micro-batch, or "
        "parallelize=hsdp with copies on each machine": slowest.overlapped
        > slowest.compute + slowest.exposed,
        "collectives between operations take long: a smaller runtime.tp, within a "
        "machine": slowest.exposed > slowest.compute / 2,
        "stages wait for each other: more micro-batches, or a smaller runtime.pp": len(
            plan.positions
        )
        > 1
        and plan.seconds > 1.25 * passes,
    }
    return [advice for advice, applies in found.items() if applies]


def values(plan: Plan) -> dict[str, Any]:
    """Return all numbers of a plan, in bytes, operations and seconds."""
    return asdict(plan) | {
        "fits": plan.fits,
        "peak": plan.worst.bytes,
        "usable": plan.device.usable,
        "tokens_per_second": plan.tokens_per_second,
        "change_first": change_first(plan),
    }
