"""torchtitan's parallelization and pipeline stages of its own Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

from ditty_di.parallelize.fits import Degrees, Parts
from ditty_di.parallelize.schedule import (
    Stages,
    StageSchedule,
    several_stages_a_rank,
    stages_of_rank,
)
from ditty_di.parallelize.stages import arguments, unfit_degrees, validate
from ditty_di.protocols import early_checks

NOT_ITS_LLAMA = """\
parallelize: torchtitan's function shards its own Llama, and the model is a {kind}; write \
parallelize=fsdp, or model=titan_llama"""


def _fits(parts: Parts, degrees: Degrees) -> list[str]:
    """Return that it is another model, or which degrees cannot divide it."""
    from torchtitan.models.llama3 import Llama3Model

    if not isinstance(parts.model, Llama3Model):
        return [NOT_ITS_LLAMA.format(kind=type(parts.model).__name__)]
    attention: Any = parts.model.config.layers[0].attention
    heads = {"heads": attention.n_heads, "key-value heads": attention.n_kv_heads}
    numbers = {what: n or attention.n_heads for what, n in heads.items()}
    fit = [n for n in range(1, attention.n_heads + 1) if not any(h % n for h in numbers.values())]
    found = [
        f"runtime.tp={degrees.tp}: {number} {what}; tp fits {', '.join(map(str, fit))}"
        for what, number in numbers.items()
        if number % degrees.tp
    ]
    if degrees.ep > 1:
        found.append(f"runtime.ep={degrees.ep}: torchtitan's Llama has no experts; ep fits 1")
    return found


def _stages_fit(parts: Parts, degrees: Degrees) -> list[str]:
    """Return why torchtitan's Llama does not fit the degree of pipeline parallelism."""
    from torchtitan.models.llama3 import Llama3Model

    if degrees.pp == 1:
        return []
    if not isinstance(parts.model, Llama3Model):
        return [
            f"runtime.pp={degrees.pp}: torchtitan's function splits its own Llama, and the model "
            f"is a {type(parts.model).__name__}; write pipeline=stages, or model=titan_llama"
        ]
    schedule = arguments(parts.pipeline_fn)["schedule"]
    per_rank = 2 if several_stages_a_rank(schedule) else 1
    # Embeddings and head count as a layer each.
    most = (len(parts.model.config.layers) + 2) // per_rank
    found = []
    if degrees.pp > most:
        fit = ", ".join(map(str, range(1, most + 1)))
        found.append(
            f"runtime.pp={degrees.pp}: {len(parts.model.config.layers)} layers do not fill "
            f"{degrees.pp * per_rank} stages; pp fits {fit}"
        )
    return found + unfit_degrees(schedule, parts, degrees)


@early_checks(validate=validate, fits=[_stages_fit])
def pipeline_llama(
    model: nn.Module,
    /,
    *,
    parallel_dims: ParallelDims,
    device: torch.device,
    loss_fn: Callable[..., Tensor],
    parallelize_fn: Callable[..., nn.Module],
    schedule: str = "1F1B",
) -> tuple[StageSchedule, list[nn.Module], bool, bool]:
    """Split a torchtitan Llama into pipeline stages by torchtitan's own function.

    Args:
        model: a `torchtitan.models.llama3.Llama3Model`.
        parallel_dims: degrees and meshes of the run.
        device: of the stages.
        loss_fn: called with the model's output and the number of the micro-batch.
        parallelize_fn: parallelizes a stage.
        schedule: name of torch's pipeline schedule; see `ditty_di.parallelize.stages.split`.

    Returns:
        The schedule, this rank's stages, and whether the first and the last stage are among them.
    """
    from torchtitan.distributed.pipeline_parallel import pipeline_llm

    def parallelize(part: nn.Module, *, parallel_dims: ParallelDims, **ignored: Any) -> nn.Module:
        return parallelize_fn(part, parallel_dims=parallel_dims)

    mesh, ranks = parallel_dims.get_mesh("pp"), parallel_dims.pp
    # Its schedule is for one shape and number of micro-batches, and is not used.
    _, modules, _, _ = pipeline_llm(
        model,
        parallel_dims=parallel_dims,
        training=TrainingConfig(local_batch_size=2 * ranks),
        parallelism=ParallelismConfig(
            pipeline_parallel_degree=ranks,
            pipeline_parallel_schedule=schedule,
            pipeline_parallel_microbatch_size=1,
        ),
        compile_config=CompileConfig(),
        ac_config=None,  # type: ignore[arg-type]
        dump_folder="",
        device=device,
        model_config=model.config,  # type: ignore[arg-type]
        parallelize_fn=parallelize,
        loss_fn=loss_fn,
    )
    total = ranks * len(modules)
    numbers = stages_of_rank(schedule, mesh.get_local_rank(), ranks, total)
    stages = Stages(dict(zip(numbers, modules, strict=True)), total)
    made = StageSchedule(schedule, stages, group=mesh.get_group(), device=device, loss_fn=loss_fn)
    return made, modules, 0 in stages.modules, stages.has_last


@early_checks(fits=[_fits])
def parallelize_llama(
    model: nn.Module,
    /,
    *,
    parallel_dims: ParallelDims,
    param_dtype: str | None = None,
    reduce_dtype: str | None = None,
) -> nn.Module:
    """Shard a torchtitan Llama by torchtitan's own function.

    Args:
        model: a `torchtitan.models.llama3.Llama3Model`.
        parallel_dims: degrees and meshes of the run.
        param_dtype: dtype of forward and backward passes; None is float32.
        reduce_dtype: dtype in which gradients are reduced; None is float32.

    Raises:
        ValueError: any other model.
    """
    from torchtitan.models.llama3 import Llama3Model
    from torchtitan.models.llama3.parallelize import parallelize_llama as parallelize

    if not isinstance(model, Llama3Model):
        raise ValueError(NOT_ITS_LLAMA.format(kind=type(model).__name__))
    return parallelize(
        model,
        parallel_dims=parallel_dims,
        training=TrainingConfig(
            mixed_precision_param=param_dtype or "float32",  # type: ignore[arg-type]
            mixed_precision_reduce=reduce_dtype or "float32",  # type: ignore[arg-type]
        ),
        parallelism=ParallelismConfig(spmd_backend=parallel_dims.spmd_backend),  # type: ignore[arg-type]
        compile_config=CompileConfig(),
        ac_config=None,
        dump_folder="",
    )
