"""torchtitan's parallelization of its own Llama."""

from __future__ import annotations

from torch import nn
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims


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
        raise ValueError(
            f"parallelize: torchtitan's function shards its own Llama, and the model is a "
            f"{type(model).__name__}; write parallelize=fsdp, or model=titan_llama"
        )
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
