"""Run the micro-batches of an optimizer step, or of a validation, through pipeline stages.

torch's schedules send tensors of one shape, which they would learn by running a micro-batch and the
loss first. Here they are told: hidden states `[rows, length, ...]` have the same dtype and the same
last dimensions between all stages, so one forward pass of the first stage is enough for all shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)
from torch.utils._pytree import tree_map_only

from ditty_di.compat import forward_only, run_micro_batches
from ditty_di.fqn import canonical_fqn
from ditty_di.models.weights import local
from ditty_di.runtime import gathered
from ditty_di.seed import preserved_rng

log = logging.getLogger(__name__)

#: Schedules that split the backward pass into one for inputs and one for weights.
ZERO_BUBBLE = ("InterleavedZeroBubble", "ZBVZeroBubble")
#: torch's schedules that are supported.
SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", *ZERO_BUBBLE)

_CANNOT_PAD = """\
runtime.pp: the micro-batches of a step go through the stages in one shape, and these have \
{shapes} tokens, but the input {name!r} cannot be padded; use rows of one length, as with \
batching=packed"""


def several_stages_a_rank(schedule: str) -> bool:
    """Return whether a schedule is for ranks with several stages.

    Args:
        schedule: one of `SCHEDULES`.
    """
    return issubclass(get_schedule_class(schedule), PipelineScheduleMulti)


def stages_of_rank(schedule: str, rank: int, ranks: int, stages: int) -> list[int]:
    """Return the numbers of the stages that a rank has.

    Args:
        schedule: one of `SCHEDULES`.
        rank: in the pipeline.
        ranks: of the pipeline.
        stages: of all ranks.
    """
    if get_schedule_class(schedule) is ScheduleZBVZeroBubble:  # a V: down the ranks and up again
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, ranks))


def shares_of(blocks: int, stages: int, layers: Sequence[int] | None = None) -> list[range]:
    """Return the numbers of the blocks of each stage.

    Args:
        blocks: number of all blocks, at least `stages`.
        stages: number of stages.
        layers: number of blocks of each stage; None shares them evenly.
    """
    if layers is None:
        sizes = [1] * stages
        for _ in range(blocks - stages):
            # Of equal loads the later stage gets one more: it has fewer micro-batches in flight.
            load = [n + (i == 0) + (i == stages - 1) for i, n in enumerate(sizes)]
            sizes[min(range(stages), key=lambda i: (load[i], -i))] += 1
    else:
        sizes = list(layers)
    starts = [sum(sizes[:i]) for i in range(stages)]
    return [range(start, start + n) for start, n in zip(starts, sizes, strict=True)]


#: Argument of a stage: the number of the micro-batch.
MICRO_BATCH = "micro_batch"


@dataclass
class Stages:
    """The stages of this rank.

    Args:
        modules: by number, as they are trained. A stage takes the model's input, or the hidden
            states of the stage before it, and the model's other arguments by name.
        total: number of stages of all ranks.
        output: returns the model's output, for the last stage and what it returned.
        tied: names of parameters that the first and the last stage both have.
        numbered: whether stages take the number of the micro-batch as argument `MICRO_BATCH`.
    """

    modules: dict[int, nn.Module]
    total: int
    output: Callable[[nn.Module, Any], Any] = lambda stage, returned: returned
    tied: Sequence[str] = ()
    numbered: bool = False

    @property
    def first(self) -> nn.Module | None:
        """The first stage, where this rank has it."""
        return self.modules.get(0)

    @property
    def has_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.total - 1 in self.modules


@dataclass(eq=False)
class StageSchedule:
    """A schedule of torch's over this rank's stages, for micro-batches of any shape.

    Micro-batches of one run that differ in rows or length are padded to the largest: causal models
    give the same outputs for what is not padding. The loss gets outputs without padding.

    Args:
        schedule: name of torch's schedule, one of `SCHEDULES`.
        stages: the stages of this rank.
        group: ranks of the pipeline.
        device: of the stages.
        loss_fn: called with the model's output and the number of the micro-batch, `[1]`.
    """

    schedule: str
    stages: Stages
    group: dist.ProcessGroup = field(kw_only=True)
    device: torch.device = field(kw_only=True)
    loss_fn: Callable[..., Tensor] = field(kw_only=True)

    def __post_init__(self) -> None:
        self._sizes: list[tuple[int, int]] = []
        self._hidden: tuple[torch.Size, torch.dtype] | None = None
        self._made: dict[bool, tuple[Any, Any]] = {}

    @cached_property
    def tied(self) -> list[nn.Parameter]:
        """Trained parameters of this rank that the first and the last stage both have.

        They are looked up when they have their values: then they are no longer replaced.
        """
        found: dict[str, nn.Parameter] = {}
        for number in {0, self.stages.total - 1} & self.stages.modules.keys():
            named = self.stages.modules[number].named_parameters()
            found |= {canonical_fqn(name): p for name, p in named if p.requires_grad}
        return [found[name] for name in self.stages.tied if name in found]

    @property
    def duplicates(self) -> list[nn.Parameter]:
        """Parameters of this rank that the rank of the first stage has as well."""
        return [] if self.stages.first is not None else self.tied

    def require_micro_batches(self, size: int) -> None:
        """Raise ValueError unless the schedule can run so many micro-batches; warn if it idles.

        Args:
            size: micro-batches of an optimizer step.
        """
        ranks = dist.get_world_size(self.group)
        rounds = max(1, size // ranks)
        if self.schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and size % rounds:
            fit = [n for n in range(1, 4 * ranks + 1) if not n % max(1, n // ranks)]
            raise ValueError(
                f"pipeline.schedule={self.schedule}: an optimizer step has {size} micro-batches, "
                f"which do not divide into rounds of {ranks} ranks; {', '.join(map(str, fit))}, "
                f"... do (global_batch_size / data.loader.micro_batch_size / data-parallel ranks)"
            )
        if size < self.stages.total and dist.get_rank() == 0:
            log.warning(
                "runtime.pp=%d: %d micro-batches a step leave most of %d stages idle most of the "
                "time; lower data.loader.micro_batch_size, or raise global_batch_size",
                *(ranks, size, self.stages.total),
            )

    def run(self, inputs: list[dict[str, Any]], *, backward: bool) -> list[Tensor] | None:
        """Run forward, or forward and backward passes, of micro-batches.

        Args:
            inputs: arguments of the model for each micro-batch, on all ranks of the pipeline;
                `"input"` is the positional one, `[rows, length, ...]`.
            backward: whether gradients are accumulated.

        Returns:
            The loss of each micro-batch on the rank of the last stage, None on the others.

        Raises:
            ValueError: the micro-batches have several shapes and cannot be padded.
        """
        self._sizes = [_size(one["input"]) for one in inputs]
        rows, length = map(max, zip(*self._sizes, strict=True))
        inputs = [_padded(one, rows, length, self._sizes) for one in inputs]
        if self.stages.numbered:
            inputs = [{**one, MICRO_BATCH: n} for n, one in enumerate(inputs)]
        schedule = self._for_shape(inputs, backward)
        ends = {"first": self.stages.first is not None, "last": self.stages.has_last}
        losses = run_micro_batches(schedule, inputs, backward=backward, **ends)
        if backward:
            self._sum_tied_gradients()
        return losses

    def _loss(self, returned: Any, number: Tensor, **ignored: Any) -> Tensor:
        """Return the loss of what the last stage returned for a micro-batch."""
        output = self.stages.output(self.stages.modules[self.stages.total - 1], returned)
        own, largest = self._sizes[int(number)], tuple(map(max, zip(*self._sizes, strict=True)))
        if own != largest:
            output = tree_map_only(Tensor, lambda x: _without_padding(x, own, largest), output)
        return self.loss_fn(output, number)

    def _for_shape(self, inputs: list[dict[str, Any]], backward: bool) -> Any:
        """Return torch's schedule; a new one if the shape is not that of the last run."""
        ids = inputs[0]["input"]
        key = (len(inputs), ids.shape, ids.dtype)
        made = self._made.get(backward)
        if made is None or made[0] != key:
            rest, dtype = self._hidden or self._run_first_stage(**inputs[0])
            given = torch.empty_like(ids, device="meta")
            hidden = torch.empty(
                (*ids.shape[:2], *rest), dtype=dtype, device="meta", requires_grad=True
            )
            stages = [
                pipelining.PipelineStage(
                    module,
                    number,
                    self.stages.total,
                    self.device,
                    input_args=(hidden if number else given,),
                    output_args=(hidden,),
                    group=self.group,
                )
                for number, module in self.stages.modules.items()
            ]
            schedule = self.for_stages(stages, len(inputs))
            if not backward and several_stages_a_rank(self.schedule):
                forward_only(schedule)
            made = self._made[backward] = key, schedule
        return made[1]

    def for_stages(self, stages: list[Any], micro_batches: int) -> Any:
        """Return torch's schedule.

        Args:
            stages: torch's stages of this rank.
            micro_batches: of a step.
        """
        kind = cast(Any, get_schedule_class(self.schedule))
        own = stages if several_stages_a_rank(self.schedule) else stages[0]
        # The loss is divided by the global count already: no second division.
        return kind(own, micro_batches, loss_fn=self._loss, scale_grads=False)

    def _run_first_stage(self, input: Tensor, **keywords: Any) -> tuple[Any, torch.dtype]:
        """Return the last dimensions and the dtype of hidden states, on all ranks."""
        own = None
        if self.stages.first is not None:
            with torch.no_grad(), preserved_rng(self.device):
                hidden = self.stages.first(input, **keywords)
            for module in self.stages.first.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            own = hidden.shape[2:], hidden.dtype
            if hidden.shape[:2] != input.shape[:2]:
                raise ValueError(
                    f"runtime.pp: the first stage makes {list(hidden.shape)} of inputs "
                    f"{list(input.shape)}; hidden states must be [rows, length, ...]"
                )
        self._hidden = next(one for one in gathered(own, self.group) if one is not None)
        return self._hidden

    def _sum_tied_gradients(self) -> None:
        """Add the other end's gradients of parameters that the first and the last stage share."""
        if not self.tied:
            return
        ranks = dist.get_world_size(self.group)
        last = next(
            r
            for r in range(ranks)
            if self.stages.total - 1 in stages_of_rank(self.schedule, r, ranks, self.stages.total)
        )
        peer = last if self.stages.first is not None else 0
        for parameter in self.tied:
            if parameter.grad is None:
                continue
            own = local(parameter.grad)
            other = torch.empty_like(own)
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, own.contiguous(), group=self.group, group_peer=peer),
                    dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
                ]
            )
            for work in works:
                work.wait()
            own.add_(other)


def _size(ids: Tensor) -> tuple[int, int]:
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        raise ValueError("runtime.pp: the model's input must be a tensor [rows, length, ...]")
    return ids.shape[0], ids.shape[1]


def _padded(
    inputs: dict[str, Any], rows: int, length: int, sizes: list[tuple[int, int]]
) -> dict[str, Any]:
    """Return inputs in a larger shape: zeros behind each row, and the first row again below.

    A row of zeros alone could have no token to attend to.
    """
    own = _size(inputs["input"])
    if own == (rows, length):
        return inputs
    made = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape[:2] != own or value.dim() > 2:
            shapes = ", ".join(f"{a} x {b}" for a, b in dict.fromkeys(sizes))
            raise ValueError(_CANNOT_PAD.format(shapes=shapes, name=name))
        longer = F.pad(value, (0, length - own[1]))
        made[name] = torch.cat([longer, longer[:1].expand(rows - own[0], -1)])
    return made


def _without_padding(tensor: Tensor, own: tuple[int, int], largest: tuple[int, ...]) -> Tensor:
    return tensor[: own[0], : own[1]] if tuple(tensor.shape[:2]) == largest else tensor
