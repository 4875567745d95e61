"""Tensor parallelism with sequence parallelism, for models of transformers.

Each rank has a part of every large matrix, and between the split layers a part of every sequence
(https://arxiv.org/abs/2205.05198). Modules compute with local tensors; the parameters are
`DTensor`s on the mesh of these ranks, for FSDP, the optimizer and checkpoints.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di.messages import refuse
from ditty_di.models.weights import slices
from ditty_di.parallelize.collectives import Sequence, shared, summed
from ditty_di.parallelize.fits import Degrees, Parts
from ditty_di.parallelize.tensor_plan import (
    TensorPlan,
    base_layer,
    is_packed,
    lora_pairs,
    read_plan,
)
from ditty_di.replaced import replaced

#: Runs a module's forward pass: `(module, forward, args, kwargs)`.
Around = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def tensor_parallel(model: nn.Module, /, *, parallel_dims: ParallelDims) -> None:
    """Split the layers of a model in place, by its plan (`ditty_di.parallelize.tensor_plan`).

    The first block splits the sequence, attention and feed-forward modules gather it and reduce
    their outputs, and the last block joins it. What is outside of the blocks works on whole
    activations, equal on all ranks. Logits are `DTensor`s whose vocabulary is split.

    Args:
        model: on meta, or with values that are equal on all ranks; it may have LoRA and quantized
            layers.
        parallel_dims: the layout.

    Raises:
        ValueError: the model cannot be split among these ranks.
    """
    mesh = parallel_dims.get_mesh("tp")
    plan = read_plan(model, expert_parallel=parallel_dims.ep_enabled)
    refuse(misfits(model, plan, mesh.size()))
    sequence = Sequence(mesh)
    _distribute(model, plan, mesh)
    for layer in plan.rows.values():
        _wrap(layer, functools.partial(_reduced, sequence))
    for region in plan.regions.values():
        _wrap(region, _on_input(sequence.gather, region))
    for head in plan.heads.values():
        _wrap(head, functools.partial(_some_logits, mesh))
    for embedding in plan.embeddings.values():
        table: Any = embedding.weight
        _wrap(embedding, functools.partial(_some_rows, mesh, slices(table)[0]))
    if plan.blocks:
        _wrap(plan.blocks[0], _on_input(sequence.split, plan.blocks[0]))
        _wrap(plan.blocks[-1], functools.partial(_on_output, sequence.join))


# -- what fits ------------------------------------------------------------------------------------


def tensor_fits(parts: Parts, degrees: Degrees) -> list[str]:
    """Return why the parts do not fit the degree of tensor parallelism: a rule of `fits`."""
    if degrees.tp == 1:
        return []
    plan = read_plan(parts.model, expert_parallel=degrees.ep > 1)
    if getattr(parts.loss_fn, "needs_whole_head", False):
        plan.problems.append(
            f"{type(parts.loss_fn).__name__} multiplies by the whole output projection, of which a "
            f"rank has a part (loss=chunked takes it)"
        )
    return misfits(parts.model, plan, degrees.tp)


def misfits(model: nn.Module, plan: TensorPlan, ranks: int) -> list[str]:
    """Return why a model cannot be split among so many ranks, and what would fit.

    Args:
        model: the model.
        plan: its plan.
        ranks: the degree of tensor parallelism.
    """
    found = plan.problems or list(_indivisible(model, plan, ranks))
    if not found:
        return []
    fit = [n for n in range(2, 129) if not plan.problems and not any(_indivisible(model, plan, n))]
    works = ", ".join(map(str, [1, *fit]))
    return [f"runtime.tp={ranks}: {problem}; tp fits {works}" for problem in found]


def _indivisible(model: nn.Module, plan: TensorPlan, ranks: int) -> Iterator[str]:
    """Yield what cannot be divided by a number of ranks."""
    config = _text_config(model)
    known = {"num_attention_heads": "heads", "num_key_value_heads": "key-value heads"}
    found = {what: getattr(config, name, None) for name, what in known.items()}
    heads = {what: n if isinstance(n, list | tuple) else [n] for what, n in found.items()}
    odd = [f"{n} {what}" for what, ns in heads.items() for n in ns if (n or 0) % ranks]
    yield from dict.fromkeys(odd)
    for path, layer in () if odd else plan.rows.items():
        base: Any = base_layer(layer)
        step = base.column_step if is_packed(base) else 1
        if base.in_features % (ranks * step):
            blocks = f" in quantized blocks of {step}" if step > 1 else ""
            yield f"{base.in_features} inputs of {path}{blocks}"
            break
    for path, table in plan.embeddings.items():
        rows: Any = table.num_embeddings
        if -(-rows // ranks) * (ranks - 1) >= rows:  # the last rank has none
            yield f"{rows} rows of {path}"


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# -- parameters -----------------------------------------------------------------------------------


def _distribute(model: nn.Module, plan: TensorPlan, mesh: DeviceMesh) -> None:
    """Make every parameter a `DTensor`, and let its module compute with the local tensor.

    Raises:
        ValueError: a tied parameter is split in one of its uses only.
    """
    placements, partial = _placements(plan), _partial_modules(plan)
    kept = {id(m) for module in plan.experts.values() for m in module.modules()}
    in_rows = {id(base_layer(layer)) for layer in plan.rows.values()}
    made: dict[int, tuple[nn.Parameter, Placement]] = {}
    for path, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None}
        if id(module) in kept or not own:
            continue
        gradients: dict[str, Placement | None] = {}
        for name, parameter in own.items():
            placement = placements.get((id(module), name), Replicate())
            if id(parameter) not in made:
                new = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
                distributed = nn.Parameter(new, requires_grad=parameter.requires_grad)
                made[id(parameter)] = distributed, placement
            module._parameters[name], as_made = made[id(parameter)]
            if as_made != placement:
                raise ValueError(
                    f"runtime.tp={mesh.size()}: {path}.{name} is tied to a parameter that is split "
                    f"otherwise, for the model's plan lacks one of the two; tp fits 1"
                )
            whole = placement.is_replicate()
            gradients[name] = Partial() if whole and id(module) in partial else placement
            if name == "bias" and id(module) in in_rows:
                gradients[name] = None  # `_reduced` adds it once
        _wrap(module, functools.partial(_with_local_parameters, gradients))


def _placements(plan: TensorPlan) -> dict[tuple[int, str], Placement]:
    """Return how parameters are split, by module and name; the others are not."""
    found: dict[tuple[int, str], Placement] = {}

    def split(module: nn.Module, dim: int) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            # Along the inputs, biases and the scales of whole rows cannot be split.
            if dim == 0 or (parameter.dim() > 1 and parameter.shape[1] > 1):
                found[id(module), name] = Shard(dim)

    for layer in (*plan.columns.values(), *plan.heads.values(), *plan.embeddings.values()):
        split(base_layer(layer), 0)
        for _, out_of in lora_pairs(layer):
            split(out_of, 0)
    for layer in plan.rows.values():
        split(base_layer(layer), 1)
        for into, _ in lora_pairs(layer):
            split(into, 1)
    return found


def _partial_modules(plan: TensorPlan) -> set[int]:
    """Return the modules whose whole parameters get a part of their gradient on each rank."""
    inside = {id(m) for region in plan.regions.values() for m in region.modules()}
    found = {id(m) for block in plan.blocks for m in block.modules()} - inside
    found |= {id(module) for module in plan.partial}
    for layer in (*plan.columns.values(), *plan.heads.values()):
        found |= {id(into) for into, _ in lora_pairs(layer)}
    for layer in plan.rows.values():
        found |= {id(out_of) for _, out_of in lora_pairs(layer)}
    return found


# -- forward passes -------------------------------------------------------------------------------


def _wrap(module: nn.Module, around: Around) -> None:
    """Let `around` run the module's forward pass; hooks stay outside of it."""
    bound: Any = module.forward
    ordinary = getattr(bound, "__func__", lambda self, *args, **kwargs: bound(*args, **kwargs))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, MethodType(ordinary, self), args, kwargs)

    # A bound method, so that a deep copy of the model is bound to the copy.
    module.forward = MethodType(functools.wraps(ordinary)(forward), module)  # type: ignore[method-assign]


def _with_local_parameters(
    gradients: dict[str, Placement | None],
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Run with local tensors in place of the parameters; attribute access finds them first.

    `gradients` says what their gradients are on a rank; None leaves a parameter out.
    """
    own = vars(module)
    before = {name: own[name] for name in gradients if name in own}
    parameters = {name: getattr(module, name) for name in gradients}
    for name, gradient in gradients.items():
        own[name] = gradient and parameters[name].to_local(grad_placements=[gradient])
    try:
        return forward(*args, **kwargs)
    finally:
        for name in gradients:
            del own[name]
        own.update(before)


def _reduced(
    sequence: Sequence, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Tensor:
    """Sum up the products of the ranks, and then add the bias."""
    products = sequence.reduce(forward(*args, **kwargs))
    bias: Any = base_layer(layer).bias
    if bias is None:
        return products
    return products + bias.to_local(grad_placements=[Partial()]).to(products.dtype)


def _some_logits(
    mesh: DeviceMesh, head: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
) -> DTensor:
    """Compute this rank's logits of all tokens."""
    (hidden,) = args
    logits = forward(shared(hidden, mesh))  # [..., some of vocab]
    base: Any = base_layer(head)
    shape = torch.Size([*logits.shape[:-1], base.out_features])
    return DTensor.from_local(
        logits,
        mesh,
        [Shard(logits.dim() - 1)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _some_rows(
    mesh: DeviceMesh,
    rows: slice,
    table: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Tensor:
    """Look up the tokens whose rows this rank has, and sum up over the ranks."""
    (ids,) = args
    elsewhere = (ids < rows.start) | (ids >= rows.stop)
    padding: Any = table.padding_idx  # its row gets no gradient
    here = padding is not None and rows.start <= padding < rows.stop
    with replaced(vars(table), "padding_idx", padding - rows.start if here else None):
        found = forward((ids - rows.start).masked_fill(elsewhere, 0))
    return summed(found.masked_fill(elsewhere[..., None], 0.0), mesh)


def _on_input(move: Callable[[Tensor], Tensor], module: nn.Module) -> Around:
    """Return a wrapper that moves the first argument, given by position or by name."""
    first = next(iter(inspect.signature(module.forward).parameters))

    def around(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if args:
            return forward(move(args[0]), *args[1:], **kwargs)
        return forward(**{**kwargs, first: move(kwargs[first])})

    return around


def _on_output(
    move: Callable[[Tensor], Tensor],
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Move the output, or the first one of a tuple."""
    output = forward(*args, **kwargs)
    return (move(output[0]), *output[1:]) if isinstance(output, tuple) else move(output)
