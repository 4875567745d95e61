"""Plan a training: what each rank of a layout holds, computes and sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ditty_di.data.options import require
from ditty_di.loggers import flops
from ditty_di.losses.plain import as_loss
from ditty_di.models.weights import on_meta
from ditty_di.parallelize.data_parallel import repeated_blocks
from ditty_di.parallelize.fits import Parts, require_fit
from ditty_di.planning.device import Device
from ditty_di.planning.fakes import fake_ranks
from ditty_di.planning.layers import signature
from ditty_di.planning.rank import RankPlan, combine, pass_seconds
from ditty_di.planning.recipe import Recipe, Stage, split
from ditty_di.planning.schedule import Order, order_of, pipeline_seconds
from ditty_di.planning.stage import Shape, StageRunner, Step
from ditty_di.processors import Processors
from ditty_di.runtime import Runtime
from ditty_di.seed import preserved_rng
from ditty_di.training.setup import accumulation_steps, prepare_model


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a training.

    Args:
        device: whose figures were used.
        world_size: ranks.
        layout: degrees of the mesh above 1, by name.
        rows: rows of a micro-batch.
        tokens: labels of a micro-batch.
        micro_batches: micro-batches per rank and step.
        data_ranks: ranks that have different rows.
        positions: a rank of each position in the pipeline.
        checkpoint: bytes of a checkpoint over all ranks.
        parameters: number of parameters of the model.
        active_parameters: number of those that a token uses: of routed experts, its own.
        seconds: seconds of a step.
        notes: what the reader should know.
    """

    device: Device
    world_size: int
    layout: dict[str, int]
    rows: int
    tokens: int
    micro_batches: int
    data_ranks: int
    positions: list[RankPlan]
    checkpoint: int
    parameters: int
    active_parameters: int
    seconds: float
    notes: list[str]

    @property
    def worst(self) -> RankPlan:
        """The rank with the highest peak."""
        return max(self.positions, key=lambda rank: rank.bytes)

    @property
    def fits(self) -> bool:
        """Whether the tensors of every rank fit the device."""
        return self.worst.bytes <= self.device.usable

    @property
    def tokens_per_second(self) -> float:
        """Labels a second over all ranks."""
        return self.tokens * self.micro_batches * self.data_ranks / self.seconds


def plan(recipe: Recipe, *, world_size: int, device: Device, rank: int = 0) -> Plan:
    """Plan a training on `world_size` ranks, of which this process plays one of each stage.

    Args:
        recipe: the parts of the training.
        world_size: number of ranks.
        device: estimates times, and says what fits.
        rank: the one of a stage's ranks that is played; the first has the largest shards.

    Raises:
        ValueError: the layout does not fit the ranks or the model.
    """
    require(world_size >= 1, f"world_size={world_size}: write the number of ranks, at least 1")
    model = prepare_model(on_meta(recipe.model), recipe.convert, recipe.loss_fn)
    with preserved_rng(torch.device("cpu")):
        others: dict[int, list[Stage]] = {}
        with fake_ranks(world_size, rank), closing(recipe.runtime()) as runtime:
            parts = Parts(model, as_loss(recipe.loss_fn), recipe.parallelize_fn, recipe.pipeline_fn)
            require_fit(parts, runtime.parallel_dims)
            if (pp := runtime.parallel_dims.pp) == 1:
                return _planned(recipe, model, runtime, device, others)
        for position in range(1, pp):
            # How a model is split does not depend on the other degrees.
            with fake_ranks(pp, position), closing(Runtime(pp=pp)) as runtime:
                others[position] = split(recipe, model, runtime)[1]
        with fake_ranks(world_size, rank), closing(recipe.runtime()) as runtime:
            return _planned(recipe, model, runtime, device, others)


def _planned(
    recipe: Recipe,
    model: nn.Module,
    runtime: Runtime,
    device: Device,
    others: dict[int, list[Stage]],
) -> Plan:
    """Plan all stages on the layout of the rank that is played; `others` are not its own."""
    schedule, own = split(recipe, model, runtime)
    notes: list[str] = []
    micro_batches = _micro_batches(recipe, runtime, schedule, notes)
    positions = [own, *(others[n] for n in sorted(others))]
    steps = _measured([*chain(*positions)], recipe, runtime, device, micro_batches)
    if not all(step.linear for step in steps.values()):
        notes.append("counts are not linear in the blocks of this model: all of them were run")
    if getattr(recipe.parallelize_fn, "keywords", {}).get("cpu_offload"):
        notes.append("what cpu_offload keeps in host memory is counted on the device")
    order: Order = (
        {0: [(0, "F"), (0, "B")]} if schedule is None else order_of(schedule, micro_batches)
    )
    ranks = [
        combine({stage.index: steps[stage.index] for stage in stages}, order[n])
        for n, stages in enumerate(positions)
    ]
    if schedule is None:
        seconds = max(ranks[0].compute + ranks[0].exposed, ranks[0].overlapped)
    else:
        forward, backward = (
            {i: pass_seconds(step.counts, way).total / micro_batches for i, step in steps.items()}
            for way in ("forward", "backward")
        )
        seconds = pipeline_seconds(order, forward, backward)
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    degrees = {name: getattr(runtime.parallel_dims, name) for name in names}
    total, active = flops.parameters([model])
    return Plan(
        device=device,
        world_size=runtime.world_size,
        layout={name: degree for name, degree in degrees.items() if degree > 1},
        rows=len(recipe.batch.labels),
        tokens=recipe.batch.labels.numel(),
        micro_batches=micro_batches,
        data_ranks=runtime.dp_world_size,
        positions=ranks,
        checkpoint=sum(step.exact["checkpoint"] for step in steps.values()),
        parameters=total,
        active_parameters=active,
        seconds=seconds + max(rank.update for rank in ranks),
        notes=notes,
    )


def _micro_batches(recipe: Recipe, runtime: Runtime, schedule: Any, notes: list[str]) -> int:
    """Return the micro-batches per rank and step; note it where the rows do not divide."""
    rows = len(recipe.batch.labels)
    default = getattr(schedule, "_n_microbatches", 1)
    if recipe.global_batch_size is None:
        return default
    try:
        loader: Any = SimpleNamespace(batch_size=rows)
        return accumulation_steps(recipe.global_batch_size, dataloader=loader, runtime=runtime)
    except ValueError as error:
        planned = rows * runtime.dp_world_size * default
        notes.append(f"planned with global_batch_size={planned}, because a run refuses: {error}")
        return default


def _measured(
    stages: list[Stage], recipe: Recipe, runtime: Runtime, device: Device, micro_batches: int
) -> dict[int, Step]:
    """Return what each stage does, by number; those of the same tensors and blocks are run once."""
    processors = Processors(recipe.preprocessors, recipe.postprocessors)
    found: dict[int, Step] = {}
    known: dict[Hashable, Step] = {}
    received: list[Shape] = []
    for stage in sorted(stages, key=lambda stage: stage.index):
        tensors = [*stage.module.parameters(), *stage.module.buffers()]
        shapes = Counter((t.shape, t.dtype, t.requires_grad) for t in tensors)
        blocks = Counter(map(signature, repeated_blocks(stage.module).children()))
        alike = (stage.first, stage.last, *map(frozenset, (shapes.items(), blocks.items())))
        if alike not in known:
            batch = processors.prepare(
                recipe.batch,
                epoch=0,
                step=1,
                total_steps=1,
                device=runtime.device,
                model=stage.module,
            )
            if batch is None:
                raise ValueError("preprocessors: they reject the micro-batch that is planned")
            runner = StageRunner(
                stage,
                optimizer=recipe.optimizer,
                loss_fn=as_loss(recipe.loss_fn),
                processors=processors,
                runtime=runtime,
                device=device,
                micro_batches=micro_batches,
                saves_frozen=recipe.saves_frozen,
            )
            known[alike] = runner.run(batch, received)
        found[stage.index] = known[alike]
        received = known[alike].output
    return found
