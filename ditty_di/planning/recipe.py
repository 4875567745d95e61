"""Parts of a training that is planned, and the stages of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ditty_di.batch import Batch
from ditty_di.compat import sum_gradients_on_gloo
from ditty_di.data.options import require
from ditty_di.models.weights import on_meta
from ditty_di.parallelize.schedule import StageSchedule
from ditty_di.processors import PostProcessor, PreProcessor
from ditty_di.protocols import ModelTransform, OptimizerFactory, ParallelizeFn, PipelineFn
from ditty_di.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts of a training that a plan needs; see `ditty_di.Trainer`.

    Args:
        model: on meta or with values, which are not read.
        loss_fn: the loss.
        optimizer: called with the named trainable parameters.
        runtime: makes the runtime of a rank, once the process group exists.
        batch: a micro-batch of one rank on the CPU.
        convert: replaces layers.
        parallelize_fn: shards, wraps or compiles.
        pipeline_fn: splits the model into stages.
        preprocessors: run on the batch, with its values.
        postprocessors: run on the model's output.
        global_batch_size: rows of a step over all ranks; None is one micro-batch a rank.
        saves_frozen: whether a checkpoint has frozen parameters, too.
    """

    model: nn.Module
    loss_fn: Any
    optimizer: OptimizerFactory
    runtime: Callable[[], Runtime]
    batch: Batch
    convert: ModelTransform | None = None
    parallelize_fn: ParallelizeFn | None = None
    pipeline_fn: PipelineFn | None = None
    preprocessors: Sequence[PreProcessor] = ()
    postprocessors: Sequence[PostProcessor] = ()
    global_batch_size: int | None = None
    saves_frozen: bool = True


@dataclass(frozen=True)
class Stage:
    """A part of the model that runs by itself, not sharded yet.

    Args:
        module: on meta.
        parallelize_fn: shards it; None leaves it as it is.
        index: number of the stage in the pipeline.
        first: whether it takes the batch.
        last: whether it has the loss.
        output: returns the model's output, for a copy of the last stage and what it returned.
    """

    module: nn.Module
    parallelize_fn: ParallelizeFn | None
    index: int = 0
    first: bool = True
    last: bool = True
    output: Callable[[nn.Module, Any], Any] = lambda module, returned: returned

    def parallel(self, module: nn.Module, runtime: Runtime) -> nn.Module:
        """Return a copy of the stage's module as the rank trains it."""
        if self.parallelize_fn is not None:
            module = self.parallelize_fn(module, parallel_dims=runtime.parallel_dims)
        sum_gradients_on_gloo(module)
        return module


def split(recipe: Recipe, model: nn.Module, runtime: Runtime) -> tuple[Any, list[Stage]]:
    """Return the pipeline schedule, or None, and the stages of a rank.

    Args:
        recipe: how the model is split and sharded.
        model: on meta.
        runtime: of the rank.

    Raises:
        ValueError: a function is missing, or a stage has no parameters.
    """
    parallelize_fn, dims = recipe.parallelize_fn, runtime.parallel_dims
    if not dims.pp_enabled:
        require(
            parallelize_fn is not None or runtime.dp_world_size == 1,
            f"parallelize_fn: {runtime.dp_world_size} data-parallel ranks need a function that "
            f"synchronizes gradients, such as ditty_di.parallelize.data_parallel.shard",
        )
        return None, [Stage(model, parallelize_fn)]
    if recipe.pipeline_fn is None:
        raise ValueError("pipeline_fn: runtime.pp > 1 needs a function that splits the model")
    sharded: set[int] = set()

    def note(part: nn.Module, **ignored: Any) -> nn.Module:
        sharded.add(id(part))
        return part

    schedule, *_ = recipe.pipeline_fn(
        on_meta(model),
        parallel_dims=dims,
        device=runtime.device,
        loss_fn=recipe.loss_fn,  # not called: the schedule does not run
        parallelize_fn=note,
    )
    stages = list(_stages(schedule, dims.pp))
    for n, stage in enumerate(stages):
        if id(stage.module) in sharded:
            stages[n] = replace(stage, parallelize_fn=parallelize_fn)
        require(
            any(True for _ in stage.module.parameters()),
            f"pipeline_fn: stage {stage.index} of {dims.pp} ranks has no parameters; use a "
            f"smaller runtime.pp",
        )
    return schedule, stages


def _stages(schedule: Any, pp: int) -> Iterator[Stage]:
    """Yield the stages of a rank by its schedule, which may be one of torch's.

    Raises:
        ValueError: it is another.
    """
    if isinstance(schedule, StageSchedule):
        own = schedule.stages
        for number, module in own.modules.items():
            first, last = number == 0, number == own.total - 1
            yield Stage(module, None, number, first, last, own.output)
        return
    parts = getattr(schedule, "_stages", None) or [getattr(schedule, "_stage", None)]
    require(
        None not in parts,
        f"runtime.pp={pp}: a plan knows the schedules of ditty_di.parallelize.schedule and of "
        f"torch.distributed.pipelining, and this is a {type(schedule).__name__}; use one of them",
    )
    for one in parts:
        yield Stage(one.submod, None, one.stage_index, one.is_first, one.is_last)
