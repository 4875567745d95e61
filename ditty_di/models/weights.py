"""Fill a parallelized model with random numbers: the same values on any layout.

The model's tensors are allocated and uninitialized: `materialize` fills them with NaN (integers
with their smallest value), so that a tensor which was never set is found before the first step,
not in the loss. Bytes have no such value, but packed ones have their scales beside them.
`ditty_di.models.pretrained` reads files.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ditty_di.fqn import base_fqn, canonical_fqn
from ditty_di.seed import derived_seed, run_seed, seed_torch

#: Initializes one module.
InitModule = Callable[[nn.Module], None]


def is_meta(model: nn.Module) -> bool:
    """Return whether any tensor of the model is on the meta device."""
    return any(t.is_meta for _, t in tensors(model))


def on_meta(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy of a model without values; tied parameters stay tied.

    Args:
        model: not sharded.
        memo: objects by `id` that the copy has others for; gets those of all others, too.
    """
    memo = {} if memo is None else memo
    for _, tensor in tensors(model):
        memo.setdefault(id(tensor), meta_like(tensor))
    return copy.deepcopy(model, memo)


def meta_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor without values, a parameter like the given one, maybe of another dtype."""
    made = torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate every meta tensor of the model, filled with values that mark it as unset.

    Tied parameters stay tied (`nn.Module.to_empty` alone unties them). A model that has its values
    is not changed.

    Args:
        model: all of it on meta, or none.
        device: where to allocate.

    Raises:
        ValueError: some tensors are on meta and others are not.
    """
    owners = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append((module, name))
    kept = {name: t for name, t in tensors(model) if not t.is_meta}
    if kept and len(kept) < sum(1 for _ in tensors(model)):
        raise ValueError(
            f"model: some of its tensors are on the meta device and others are not (for example "
            f"{next(iter(kept))!r}); build all of it under torch.device('meta'), or none"
        )
    if kept:
        return
    model.to_empty(device=device)
    for (first, first_name), *others in owners.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]
    with torch.no_grad():
        for _, tensor in tensors(model):
            local(tensor).fill_(_uninitialized_value(tensor.dtype))


def uninitialized(model: nn.Module) -> list[str]:
    """Return the names of tensors that are on meta, hold NaN, or integers as allocated."""
    return [name for name, t in tensors(model) if t.is_meta or _is_uninitialized(local(t))]


def _uninitialized_value(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return torch.iinfo(dtype).min if dtype.is_signed else 0


def _is_uninitialized(tensor: Tensor) -> bool:
    """Compare piece by piece: a mask of a large embedding would be half as large again."""
    value = _uninitialized_value(tensor.dtype)
    if value == 0 or not tensor.numel():
        return False
    pieces = tensor.detach().flatten().split(1 << 24)
    if value != value:
        return any(bool(piece.isnan().any()) for piece in pieces)
    return all(bool((piece == value).all()) for piece in pieces)


# -- initializers of one module, by library -------------------------------------------------------


def torch_reset(model: nn.Module) -> InitModule:
    """Return PyTorch's initializer: a module's own `reset_parameters()`."""
    return lambda module: getattr(module, "reset_parameters", lambda: None)()


def hugging_face(model: nn.Module) -> InitModule:
    """Return transformers' initializer: the model's `_init_weights(module)`, buffers included.

    A quantized layer draws its own random values. What `_init_weights` leaves unset gets the value
    of the model's constructor; for the few models that have such tensors, each rank constructs the
    whole model on the CPU.

    Args:
        model: of transformers, also inside others such as peft's.

    Raises:
        ValueError: there is no model of transformers in it.
    """
    prefix, base = transformers_model(model)
    if base is None:
        raise ValueError(
            f"weights: {type(model).__name__} has no _init_weights, so it is not a model of "
            f"transformers; choose another init, such as weights=torch"
        )
    initialize = initializer(model)
    paths = {id(m): base_fqn(n.removeprefix(prefix).lstrip(".")) for n, m in model.named_modules()}
    constructed = cache(partial(_constructed, base))

    def init(module: nn.Module) -> None:
        if hasattr(module, "fill_from"):
            module.reset_parameters()  # type: ignore[operator]
            return
        initialize(module)
        left = {n: t for _, n, t in own_tensors(module) if not t.is_meta and _is_uninitialized(t)}
        if not left or id(module) not in paths:
            return
        whole = constructed()
        for name, tensor in left.items():
            try:
                value = getattr(whole.get_submodule(paths[id(module)]), name)
            except AttributeError:
                continue  # an adapter's
            if value.shape == tensor.shape:
                tensor.copy_(value)

    return init


def _constructed(base: Any) -> Any:
    """Return a model of the class of `base` as its constructor leaves it, whole on the CPU."""
    with torch.device("cpu"), torch.random.fork_rng([]):
        torch.manual_seed(torch.initial_seed())
        return own_class(base)(copy.deepcopy(base.config))


def own_class(model: Any) -> Any:
    """Return the class that a model had before `fully_shard` added one of its own."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def initializer(model: nn.Module) -> InitModule:
    """Return a function that calls `_init_weights` of the innermost transformers model around it.

    A model may consist of others, such as a text and a vision model, each with its own.
    """
    outermost = transformers_model(model)[1]
    # Models come before those inside them, so of several owners the innermost is kept.
    models: list[Any] = [m for m in model.modules() if hasattr(type(m), "_init_weights")]
    owners = {id(module): owner for owner in models for module in owner.modules()}
    return lambda module: owners.get(id(module), outermost)._init_weights(module)


def transformers_model(model: nn.Module) -> tuple[str, Any]:
    """Return (path, module) of the outermost model of transformers in it; ("", None) without."""
    found = ((path, m) for path, m in model.named_modules() if hasattr(type(m), "_init_weights"))
    return next(found, ("", None))


def torchtitan(model: nn.Module) -> InitModule:
    """Return torchtitan's initializer: each module's own `param_init`, then its buffers."""

    def init(module: Any) -> None:
        if hasattr(module, "_init_self_parameters"):
            module._init_self_parameters()
            module._init_self_buffers(buffer_device=None)

    return init


# -- the weights function -------------------------------------------------------------------------


def initialize(
    model: nn.Module,
    /,
    *,
    device: torch.device,
    seed: int | None = None,
    init: Callable[[nn.Module], InitModule] = torch_reset,
) -> None:
    """Initialize from random numbers that depend on the seed and each module's name only.

    Unit by unit (a repeated block, an embedding, ...), the unsharded tensors are allocated,
    initialized module by module with a generator seeded by (seed, name), and this rank's slices
    are copied: any layout gives the same model, and no rank holds more than one unsharded unit.

    Args:
        model: allocated by `materialize`.
        device: of the model.
        seed: of all values; None is the run's seed (`ditty_di.seed`).
        init: returns the initializer of one module for the model. It is called for children
            before their parents, as by `nn.Module.apply`.
    """
    seed = run_seed() if seed is None else seed
    init_module = init(model)
    done: set[int] = set()
    # Of a tied tensor the first module that has it.
    owners = {id(p): m for m in [*model.modules()][::-1] for p in m.parameters(recurse=False)}

    def dropped(tensor: Tensor) -> Tensor | None:
        return uninitialized_like(tensor) if id(tensor) in done else None

    with torch.no_grad(), torch.random.fork_rng([device] if device.type != "cpu" else []):
        for path, unit, whole_tree in _units(model):
            modules = list(unit.modules()) if whole_tree else [unit]
            names = {id(m): name for name, m in unit.named_modules(prefix=path)}
            children = {} if whole_tree else dict(unit.named_children())
            # What a unit writes into children that have their values is dropped, and done below.
            with unsharded(modules, done), swapped(children.values(), dropped):
                for module in reversed(modules):
                    seed_torch(derived_seed(seed, canonical_fqn(names[id(module)])), device)
                    init_module(module)
            for name, child in children.items():
                seed_torch(derived_seed(seed, canonical_fqn(f"{path}>{name}")), device)
                own = [p for p in child.parameters(recurse=False) if owners[id(p)] is child]
                _init_child(unit, own, init_module)


def _units(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (path, module, with its subtree): largest subtrees without repeated blocks."""
    if not any(isinstance(m, nn.ModuleList | nn.ModuleDict) for m in model.modules()):
        yield path, model, True
        return
    for name, child in model.named_children():
        yield from _units(child, f"{path}.{name}" if path else name)
    yield path, model, False


def _init_child(parent: nn.Module, parameters: list[nn.Parameter], init_module: InitModule) -> None:
    """Apply what a parent's initialization writes into a child, as T5's does to its embedding.

    The child's own parameters are unsharded for it, one child after another, and everything else
    is on meta: so the values do not depend on the sharding. What the parent writes into a head that
    is tied to the embedding is left out (ModernBERT, a third of the embedding's deviation):
    transformers ties them afterwards.
    """
    wholes = {id(p): uninitialized_like(p) for p in parameters}
    if not wholes:
        return

    def replacement(tensor: Tensor) -> Tensor:
        whole = wholes.get(id(tensor))
        return torch.empty_like(local(tensor), device="meta") if whole is None else whole

    with swapped(parent.modules(), replacement):
        init_module(parent)
    for parameter in parameters:
        whole = wholes[id(parameter)]
        if not _is_uninitialized(whole):
            local(parameter).copy_(whole[slices(parameter)])


# -- tensors and their shards ---------------------------------------------------------------------


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of each parameter and buffer once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def own_tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return (table, name, tensor) of a module's parameters and buffers, without its children."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [(table, name, t) for table in tables for name, t in table.items() if t is not None]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, to be written to."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data


def slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of the whole tensor this rank holds.

    Raises:
        ValueError: it holds several pieces, which do not lie together in the whole tensor.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if not _is_one_piece(tensor) or shape != tuple(tensor._local_tensor.shape):
        raise ValueError(
            f"a rank's part of a tensor {list(tensor.shape)} that is sharded as "
            f"{tensor.placements} over {tensor.device_mesh} is not one piece of it, so it cannot "
            f"be read, initialized or saved by slices"
        )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def _is_one_piece(tensor: DTensor) -> bool:
    """Return whether the strides of shards come from other mesh dimensions only.

    FSDP over tensor parallelism splits each of the latter's parts: its stride is their number, and
    no rank has two of them. A stride of anything else, such as two matrices in one, leaves pieces.
    """
    sizes = tensor.device_mesh.shape
    splits = [(getattr(p, "dim", None), getattr(p, "split_factor", 1)) for p in tensor.placements]
    for n, (dim, factor) in enumerate(splits):
        later = [sizes[m] for m in range(n + 1, len(splits)) if splits[m] == (dim, 1)]
        if factor not in (1, math.prod(later)):
            return False
    return True


def uninitialized_like(tensor: Tensor) -> Tensor:
    """Return an unsharded tensor of the same shape, marked as unset."""
    value, device = _uninitialized_value(tensor.dtype), local(tensor).device
    return torch.full(tensor.shape, value, dtype=tensor.dtype, device=device)


@contextmanager
def swapped(
    modules: Iterable[nn.Module], replacement: Callable[[Tensor], Tensor | None]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Replace the modules' own parameters and buffers within the context.

    Args:
        modules: without their children.
        replacement: returns the tensor to use instead of one; None keeps that.

    Yields:
        A list that has the pairs (own tensor, last value of its replacement) after the context.
    """
    entries: list[tuple[dict[str, Any], str, Tensor]] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    try:
        for module in modules:
            for table, name, tensor in own_tensors(module):
                if (new := replacement(tensor)) is not None:
                    entries.append((table, name, tensor))
                    table[name] = nn.Parameter(new, requires_grad=False)
        yield pairs
        pairs += [(tensor, table[name]) for table, name, tensor in entries]
    finally:
        for table, name, tensor in entries:
            table[name] = tensor


@contextmanager
def unsharded(modules: list[nn.Module], done: set[int]) -> Iterator[None]:
    """Make the modules' own sharded tensors whole within the context, then copy slices back.

    Args:
        modules: without their children.
        done: ids of tensors that have their values (tied to others): what is written to them is
            dropped. Those of the modules are added.
    """

    def replacement(tensor: Tensor) -> Tensor | None:
        if id(tensor) in done or isinstance(tensor, DTensor):
            return uninitialized_like(tensor)
        done.add(id(tensor))
        return None

    with swapped(modules, replacement) as pairs:
        yield
    for tensor, whole in pairs:
        here = local(tensor)
        if id(tensor) not in done and here.numel():
            here.copy_(whole[slices(tensor)])
        done.add(id(tensor))
