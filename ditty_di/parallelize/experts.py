"""Expert parallelism: each rank has some of the experts, for models of transformers.

Which modules are experts is the model's `ep_plan`. Tokens are sent to the ranks of their experts
and back by two all-to-all collectives a layer (https://arxiv.org/abs/2006.16668).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di.messages import refuse
from ditty_di.models.weights import transformers_model
from ditty_di.parallelize.fits import Degrees, Parts

#: The style of a parameter in `ep_plan` whose first dimension counts experts.
EXPERTS = "grouped_gemm"


def expert_parallel(model: nn.Module, /, *, parallel_dims: ParallelDims) -> None:
    """Split the experts of a model in place; `shard_experts` shards each rank's.

    Args:
        model: on meta, or with values that are equal on all ranks.
        parallel_dims: the layout.

    Raises:
        ValueError: the model has no experts that can be split among these ranks.
    """
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    mesh = parallel_dims.get_mesh("ep")
    refuse(misfits(model, mesh.size()))
    # No two ranks have the same tokens: those of tensor parallelism have parts of a sequence.
    ranks = (parallel_dims.world_size, 1)
    alone = init_device_mesh(mesh.device_type, ranks, mesh_dim_names=("ranks", "alone"))["alone"]
    _, base = transformers_model(model)
    apply_expert_parallelism(base, mesh, alone, _plan(base), ep_implementation="all_to_all")


def shard_experts(model: nn.Module, *, parallel_dims: ParallelDims, **options: Any) -> None:
    """Shard the experts of each rank over the ranks that have the same ones, as FSDP units.

    Args:
        model: after `expert_parallel`.
        parallel_dims: the layout.
        **options: arguments of `fully_shard`, without the mesh.
    """
    axes = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    mesh, copies = parallel_dims.get_mesh([*axes, "efsdp"]), parallel_dims.get_mesh("efsdp").size()

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Split each expert where there are fewer than ranks."""
        assert isinstance(parameter, DTensor)
        few = parameter.to_local().shape[0] < copies
        return Shard(1) if few and parameter.shape[1] % copies == 0 else None

    for module in list(model.modules()):
        own = next(iter(module._parameters.values()), None)
        if isinstance(own, DTensor) and own.device_mesh.mesh_dim_names == ("ep",):
            fully_shard(module, mesh=mesh, shard_placement_fn=placement, **options)


def experts_fit(parts: Parts, degrees: Degrees) -> list[str]:
    """Return why the parts of a run do not fit the degree of expert parallelism.

    Args:
        parts: the model.
        degrees: the layout.
    """
    return [] if degrees.ep == 1 else misfits(parts.model, degrees.ep)


def misfits(model: nn.Module, ranks: int) -> list[str]:
    """Return why the experts of a model cannot be split among so many ranks, and what would fit.

    Args:
        model: the model.
        ranks: the degree of expert parallelism.
    """
    return [f"runtime.ep={ranks}: {problem}" for problem in _problems(model, ranks)]


def _problems(model: nn.Module, ranks: int) -> Iterator[str]:
    _, base = transformers_model(model)
    if base is None or not getattr(base, "ep_plan", None):
        name = type(model if base is None else base).__name__
        yield f"{name} has no expert-parallel plan (ep_plan); ep fits 1"
        return
    try:
        import transformers.distributed.expert_parallel  # noqa: F401
    except ImportError:
        yield "this transformers does not split experts; install 5.21 or newer; ep fits 1"
        return
    parameters = dict(base.named_parameters())
    patterns = [pattern for pattern, style in base.ep_plan.items() if style == EXPERTS]
    for pattern in patterns:
        matching = [p for name, p in parameters.items() if _matches(pattern, name)]
        if not matching or not all(p.is_floating_point() for p in matching):
            yield (
                f"{pattern} is not a plain parameter, for experts with adapters or packed experts "
                f"cannot be split; leave them out (adapter.config.target_modules, "
                f"quantize.skip=[lm_head,experts]), or ep fits 1"
            )
            return
        experts = {p.shape[0] for p in matching}
        if wrong := [n for n in sorted(experts) if n % ranks]:
            fit = [n for n in range(1, min(experts) + 1) if not any(e % n for e in experts)]
            yield f"{wrong[0]} experts; ep fits {', '.join(map(str, fit))}"
            return


def _plan(base: Any) -> dict[str, str]:
    """Return the model's plan with the numbers of layers in place of `*`."""
    names = [*dict(base.named_parameters()), *dict(base.named_modules())]
    return {
        name: style
        for pattern, style in base.ep_plan.items()
        for name in names
        if _matches(pattern, name)
    }


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None
