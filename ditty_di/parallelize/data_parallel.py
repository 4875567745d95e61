"""Data parallelism for any model: FSDP2, DDP and hybrids are one function and a mesh.

The mesh comes from the runtime: `dp_shard` over all ranks is FSDP2, `dp_replicate` over all ranks
is DDP (each rank has a whole copy, gradients are all-reduced), both is HSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from ditty_di.compat import sum_gradients_on_gloo

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di.precision.casting import compute_in


def shard(
    model: nn.Module,
    /,
    *,
    parallel_dims: ParallelDims,
    dp_replicate: int = -1,
    dp_shard: int = -1,
    blocks: str | None = None,
    recompute: Callable[[nn.Module], nn.Module] | None = None,
    recompute_every: int = 1,
    compile: Mapping[str, Any] | None = None,
    param_dtype: str | None = None,
    reduce_dtype: str | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> nn.Module:
    """Checkpoint, compile and shard the repeated blocks of a model, then the rest as one unit.

    On one rank there is nothing to shard, and FSDP would copy every parameter: blocks are only
    checkpointed and compiled, and `param_dtype` casts parameters of another dtype, with the numbers
    of FSDP (`ditty_di.precision.casting`). For CPU offload and compiled blocks FSDP casts.

    Args:
        model: the model, on meta or with values.
        parallel_dims: the layout.
        dp_replicate: copies of the model that the runtime must have; -1 accepts any number. In a
            configuration, the runtime takes its degree from here.
        dp_shard: ranks that share one copy, likewise.
        blocks: path of the `ModuleList` (or `ModuleDict`) of repeated blocks, such as
            `model.layers`; None takes the one with the most parameters.
        recompute: wraps a block for activation checkpointing (`ditty_di.parallelize.recompute`);
            None keeps all activations.
        recompute_every: wrap every n-th block only.
        compile: arguments of `nn.Module.compile` for each block; None stays eager.
        param_dtype: name of the torch dtype for computation; None is the parameters' own. The
            optimizer's parameters keep their dtype (float32: master weights), and so do buffers,
            such as rotary frequencies.
        reduce_dtype: name of the torch dtype for reducing gradients; None is `param_dtype`.
        reshard_after_forward: free a block's gathered parameters between forward and backward.
            Parameters outside the blocks (embeddings, the last norm, the LM head) stay gathered,
            for the loss and the backward pass need them at once.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.

    Raises:
        ValueError: `blocks` does not name a container of blocks, or one block has trainable
            parameters of several dtypes, whose gradients FSDP2 could not reduce together.
    """
    for name, wanted in (("dp_replicate", dp_replicate), ("dp_shard", dp_shard)):
        found = getattr(parallel_dims, name)
        if wanted not in (-1, found):
            raise ValueError(
                f"parallelize: {name}={wanted}, but the runtime has {name}={found}; write "
                f"parallelize.{name}={found}"
            )
    container = _blocks(model, blocks)
    plain_blocks = list(container.children())
    if recompute is not None:
        for i, (name, block) in enumerate(list(container.named_children())):
            if i % recompute_every == 0:
                container.register_module(name, recompute(block))
    if compile is not None:
        for block in container.children():
            block.compile(**compile)

    alone = not (parallel_dims.dp_enabled or parallel_dims.cp_enabled or cpu_offload)
    if alone and param_dtype is None:
        return model
    names = {id(module): name for name, module in model.named_modules()}
    for block in container.children():
        _require_one_dtype(block, names[id(block)], apart=())
    _require_one_dtype(model, "", apart=container.children())
    # A recurrent layer lists its weights by itself, and compiled code would trace the casts.
    flat = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if alone and param_dtype and not (compile is not None or flat or parallel_dims.pp_enabled):
        compute_in(model, getattr(torch, param_dtype), units=plain_blocks)
        return model
    shard_axis = "fsdp" if parallel_dims.spmd_backend == "partial_dtensor" else "dp_shard"
    axes = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    options: dict[str, Any] = {
        "mesh": parallel_dims.get_mesh([*axes, shard_axis]),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=getattr(torch, param_dtype) if param_dtype else None,
            reduce_dtype=getattr(torch, reduce_dtype) if reduce_dtype else None,
        ),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for block in container.children():
        fully_shard(block, **options, reshard_after_forward=reshard_after_forward)
    # None is True for inner modules, but leaves the outermost one gathered after its forward.
    fully_shard(model, **options, reshard_after_forward=None if reshard_after_forward else False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global count already: sum gradients, do not average.
            module.set_gradient_divide_factor(1.0)
    if options["mesh"].device_type == "cpu":
        sum_gradients_on_gloo(model)
    return model


def _require_one_dtype(unit: nn.Module, name: str, *, apart: Iterable[nn.Module]) -> None:
    """Raise with names what FSDP2 itself raises in the first forward pass without them."""
    others = {id(p) for module in apart for p in module.parameters()}
    examples: dict[torch.dtype, str] = {}
    for own, parameter in unit.named_parameters():
        if parameter.requires_grad and id(parameter) not in others:
            examples.setdefault(parameter.dtype, f"{name}.{own}".lstrip("."))
    if len(examples) > 1:
        found = " and ".join(f"{own} ({dtype})" for dtype, own in examples.items())
        raise ValueError(
            f"parallelize: {found} are both trainable and in one unit, but FSDP2 reduces a unit's "
            f"gradients in one dtype; build the model in the dtype of what is trained "
            f"(model.dtype=float32), or freeze one of them"
        )


def _blocks(model: nn.Module, path: str | None) -> nn.Module:
    """Return the container of repeated blocks; an empty one for a model without."""
    if path is None:
        lists = [
            m for m in model.modules() if isinstance(m, nn.ModuleList | nn.ModuleDict) and len(m)
        ]
        size = {id(m): sum(p.numel() for p in m.parameters()) for m in lists}
        return max(lists, key=lambda m: size[id(m)], default=nn.ModuleList())
    try:
        container = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"parallelize: blocks={path!r}: {error}") from None
    if not any(True for _ in container.children()):
        raise ValueError(f"parallelize: blocks={path!r} has no modules in it")
    return container
