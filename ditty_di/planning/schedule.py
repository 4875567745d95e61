"""How long a pipeline schedule takes, and how many micro-batches it keeps at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed import pipelining

from ditty_di.parallelize.schedule import StageSchedule

#: Order of a rank: pairs of a stage and `F`, `B`, or the halves `I` and `W` of a backward pass.
Order = Mapping[int, list[tuple[int, str]]]


def order_of(schedule: Any, micro_batches: int) -> Order:
    """Return the forward and backward passes of each rank of a schedule, in order.

    Args:
        schedule: a `StageSchedule`, or one of `torch.distributed.pipelining`, which was made for
            this number of micro-batches.
        micro_batches: of a step.
    """
    if isinstance(schedule, StageSchedule):
        schedule = schedule.for_stages(
            [
                pipelining.PipelineStage(
                    nn.Identity(),
                    number,
                    schedule.stages.total,
                    schedule.device,
                    group=schedule.group,
                )
                for number in schedule.stages.modules
            ],
            micro_batches,
        )
    return {rank: list(_passes(actions)) for rank, actions in schedule.pipeline_order.items()}


def _passes(actions: Iterable[Any]) -> Iterator[tuple[int, str]]:
    for action in actions:
        if action is None:
            continue
        if action.sub_actions:
            yield from _passes(action.sub_actions)
        elif action.computation_type.value in ("F", "B", "I", "W"):
            yield action.stage_index, action.computation_type.value


def in_flight(passes: Iterable[tuple[int, str]], held: Mapping[int, float]) -> float:
    """Return the most that a rank holds for micro-batches between forward and backward, in bytes.

    Args:
        passes: of the rank, in order.
        held: bytes that a micro-batch holds, by stage.
    """
    now, most = 0.0, 0.0
    for stage, kind in passes:
        now += {"F": 1, "B": -1, "W": -1, "I": 0}[kind] * held[stage]
        most = max(most, now)
    return most


def pipeline_seconds(
    order: Order, forward: Mapping[int, float], backward: Mapping[int, float]
) -> float:
    """Return the time of a step, in which each pass waits for that of the stage before it.

    Args:
        order: of each rank.
        forward: seconds of a micro-batch's forward pass, by stage.
        backward: seconds of its backward pass.

    Raises:
        ValueError: the schedule cannot end.
    """
    ended: dict[tuple[int, str, int], float] = {}
    waiting = {rank: iter(passes) for rank, passes in order.items()}
    following = {rank: next(passes, None) for rank, passes in waiting.items()}
    clock = dict.fromkeys(order, 0.0)
    done: Counter[tuple[int, str]] = Counter()
    last = max(forward)
    while any(following.values()):
        moved = False
        for rank, one in following.items():
            if one is None:
                continue
            stage, kind = one
            number = done[one]  # passes of one kind come in the order of the micro-batches
            way = "F" if kind == "F" else "B"
            before = stage - 1 if way == "F" else stage + 1
            needs = kind != "W" and 0 <= before <= last
            if needs and (before, way, number) not in ended:
                continue
            seconds = forward[stage] if way == "F" else backward[stage]
            start = max(clock[rank], ended[before, way, number] if needs else 0.0)
            clock[rank] = start + seconds * (0.5 if kind in ("I", "W") else 1.0)
            if kind != "W":
                ended[stage, way, number] = clock[rank]
            done[one] += 1
            following[rank], moved = next(waiting[rank], None), True
        if not moved:
            raise ValueError(f"pipeline_fn: the schedule waits for itself: {following}")
    return max(clock.values())
