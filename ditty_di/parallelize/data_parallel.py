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

from ditty_di.data.options import at_least, require
from ditty_di.models.skipped import Skipped
from ditty_di.models.towers import language_path, towers
from ditty_di.models.weights import transformers_model
from ditty_di.parallelize.experts import shard_experts
from ditty_di.precision.casting import compute_in
from ditty_di.protocols import early_checks


def validate(
    *,
    checkpoint_every_n_blocks: int = 1,
    prefetch_blocks: int | None = None,
    param_dtype: str | None = None,
    reduce_dtype: str | None = None,
) -> None:
    """Raise ValueError for arguments of `shard` out of range."""
    at_least(1, checkpoint_every_n_blocks=checkpoint_every_n_blocks)
    at_least(0, prefetch_blocks=prefetch_blocks)
    for name, dtype in (("param_dtype", param_dtype), ("reduce_dtype", reduce_dtype)):
        found = getattr(torch, dtype or "float32", None)
        require(
            isinstance(found, torch.dtype) and found.is_floating_point,
            f"{name}={dtype!r} must be a dtype of torch, such as bfloat16",
        )


@early_checks(validate=validate)
def shard(
    model: nn.Module,
    /,
    *,
    parallel_dims: ParallelDims,
    dp_replicate: int = -1,
    dp_shard: int = -1,
    blocks: str | None = None,
    activation_checkpointing: Callable[[nn.Module], nn.Module] | None = None,
    checkpoint_every_n_blocks: int = 1,
    compile: Mapping[str, Any] | None = None,
    param_dtype: str | None = None,
    reduce_dtype: str | None = None,
    reshard_after_forward: bool | int | None = None,
    prefetch_blocks: int | None = None,
    separate_embeddings: bool = False,
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
            `model.layers`; None takes the one with the most parameters, and the largest of each
            tower of a multimodal model.
        activation_checkpointing: wraps a block for activation checkpointing
            (`ditty_di.parallelize.activation_checkpointing`); None keeps all activations.
        checkpoint_every_n_blocks: wrap every n-th block only.
        compile: arguments of `nn.Module.compile` for each block, but those of towers, whose shapes
            change with the images; None stays eager.
        param_dtype: name of the torch dtype for computation; None is the parameters' own. The
            optimizer's parameters keep their dtype (float32: master weights), and so do buffers,
            such as rotary frequencies.
        reduce_dtype: name of the torch dtype for reducing gradients; None is `param_dtype`.
        reshard_after_forward: free a block's gathered parameters between forward and backward; a
            number leaves them gathered within groups of so many ranks. None frees them unless the
            model is split into pipeline stages, which would gather them again for every
            micro-batch. Parameters outside the blocks (embeddings, the last norm, the LM head) stay
            gathered, for the loss and the backward pass need them at once.
        prefetch_blocks: blocks that are gathered ahead of the running one; None leaves it to FSDP,
            which gathers one ahead in the backward pass.
        separate_embeddings: shard embeddings and LM head as units of their own, which need less
            memory at a time, and more communication: the embeddings are gathered twice.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.

    Raises:
        ValueError: `blocks` does not name a container of blocks; one block has trainable parameters
            of several dtypes, whose gradients FSDP2 could not reduce together; or
            `separate_embeddings` for a model whose embeddings are tied or not known.
    """
    validate(
        checkpoint_every_n_blocks=checkpoint_every_n_blocks,
        prefetch_blocks=prefetch_blocks,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
    )
    for name, wanted in (("dp_replicate", dp_replicate), ("dp_shard", dp_shard)):
        found = getattr(parallel_dims, name)
        if wanted not in (-1, found):
            raise ValueError(
                f"parallelize: {name}={wanted}, but the runtime has {name}={found}; write "
                f"parallelize.{name}={found}"
            )
    if reshard_after_forward is None:
        reshard_after_forward = not parallel_dims.pp_enabled
    container = repeated_blocks(model, blocks)
    beside = [repeated_blocks(tower) for tower in towers(model)] if blocks is None else []
    containers = [container, *(each for each in beside if each is not container)]
    plain_blocks = [block for each in containers for block in _own_blocks(each)]
    if activation_checkpointing is not None:
        for each in containers:
            for i, (name, block) in enumerate(list(each.named_children())):
                if i % checkpoint_every_n_blocks == 0 and block in plain_blocks:
                    each.register_module(name, activation_checkpointing(block))
    blocks_of_text = _own_blocks(container)
    units = [block for each in containers for block in _own_blocks(each)]
    if compile is not None:
        for block in blocks_of_text:
            block.compile(**compile)

    dims = parallel_dims
    alone = not (dims.dp_enabled or dims.cp_enabled or dims.ep_enabled or cpu_offload)
    if alone and param_dtype is None:
        return model
    names = {id(module): name for name, module in model.named_modules()}
    for block in units:
        _require_one_dtype(block, names[id(block)], apart=())
    _require_one_dtype(model, "", apart=units)
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
        "offload_policy": OffloadPolicy(),
    }
    if cpu_offload:
        pinned = options["mesh"].device_type != "cpu"  # pinning needs an accelerator
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
    if parallel_dims.ep_enabled:
        own = {name: option for name, option in options.items() if name != "mesh"}
        own["reshard_after_forward"] = reshard_after_forward
        shard_experts(model, parallel_dims=parallel_dims, **own)
    for block in units:
        fully_shard(block, **options, reshard_after_forward=reshard_after_forward)
    if prefetch_blocks is not None:
        _prefetch(blocks_of_text, prefetch_blocks)
    for unit in _untied_embeddings(model) if separate_embeddings else ():
        fully_shard(unit, **options, reshard_after_forward=reshard_after_forward)
    # None is True for inner modules, but leaves the outermost one gathered after its forward.
    fully_shard(model, **options, reshard_after_forward=None if reshard_after_forward else False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global count already: sum gradients, do not average.
            module.set_gradient_divide_factor(1.0)
    if options["mesh"].device_type == "cpu":
        sum_gradients_on_gloo(model)
    return model


def _untied_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return embeddings and output head of a model of transformers, if they share no parameter.

    Raises:
        ValueError: they do, or it is another model.
    """
    base = transformers_model(model)[1]
    found = [] if base is None else [base.get_input_embeddings(), base.get_output_embeddings()]
    units = [module for module in found if module is not None and has_parameters(module)]
    parameters = [id(p) for module in units for p in module.parameters()]
    if base is None or len(set(parameters)) < len(parameters):
        why = "are not known" if base is None else "are tied"
        raise ValueError(
            f"parallelize: separate_embeddings=true, but embeddings and output head of the "
            f"{type(base or model).__name__} {why}; write parallelize.separate_embeddings=false"
        )
    return units


def has_parameters(module: nn.Module) -> bool:
    """Return whether a module has parameters, also inside of others."""
    return next(module.parameters(), None) is not None


def _prefetch(blocks: list[Any], ahead: int) -> None:
    """Let each block begin to gather those that run after it, forward and backward."""
    for order, method in (
        (blocks, "set_modules_to_forward_prefetch"),
        (blocks[::-1], "set_modules_to_backward_prefetch"),
    ):
        for i, block in enumerate(order):
            getattr(block, method)(order[i + 1 : i + 1 + ahead])


def _own_blocks(container: nn.Module) -> list[nn.Module]:
    """Return the blocks without those that other pipeline stages have."""
    return [block for block in container.children() if not isinstance(block, Skipped)]


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


def repeated_blocks(model: nn.Module, path: str | None = None) -> nn.Module:
    """Return the container of repeated blocks; an empty one for a model without.

    Args:
        model: the model.
        path: of the container; None takes the one with the most parameters, in a multimodal model
            that of its language model.

    Raises:
        ValueError: `path` does not name a container of blocks.
    """
    if path is None:
        model = model.get_submodule(language_path(model) or "")
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
