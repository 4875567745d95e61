"""Filling a parallelised model with random numbers: the same values on any layout.

A model comes here with its parameters allocated and uninitialised: `materialize` fills them with
NaN (integers with their smallest value), so that a tensor which nobody set is found before the
first step, not in the loss. Bytes have no such value, but packed ones have their scales beside
them. `ditty_di.models.pretrained` reads files.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.names import base_fqn, canonical_fqn
from ditty_di.seed import run_seed


def is_meta(model: nn.Module) -> bool:
    """Whether anything of the model still has no memory."""
    return any(t.is_meta for _, t in _tensors(model))


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives every meta tensor of the model memory on `device`, filled with what says "unset".

    Tied parameters stay tied (`nn.Module.to_empty` alone unties them), and what already has
    values keeps them.
    """
    owners = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((module, name))
    kept = {name: t for name, t in _tensors(model) if not t.is_meta}
    if kept and len(kept) < sum(1 for _ in _tensors(model)):
        raise ValueError(
            f"model: some of its tensors are on the meta device and others are not (for example "
            f"{next(iter(kept))!r}); build all of it under torch.device('meta'), or none"
        )
    if kept:
        return
    model.to_empty(device=device)
    for (first, first_name), *others in owners.values():
        for module, name in others:
            if module._parameters[name] is not first._parameters[first_name]:
                module._parameters[name] = first._parameters[first_name]
    with torch.no_grad():
        for _, tensor in _tensors(model):
            local(tensor).fill_(_unset_value(tensor.dtype))


def unset(model: nn.Module) -> list[str]:
    """Names of parameters and buffers that are on meta, hold NaN, or integers as they were made."""
    return [name for name, t in _tensors(model) if t.is_meta or _is_unset(local(t))]


def _unset_value(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return torch.iinfo(dtype).min if dtype.is_signed else 0


def _is_unset(tensor: Tensor) -> bool:
    """By pieces: a mask of a large embedding would be half as large again."""
    value = _unset_value(tensor.dtype)
    if value == 0 or not tensor.numel():
        return False
    pieces = tensor.detach().flatten().split(1 << 24)
    if value != value:
        return any(bool(piece.isnan().any()) for piece in pieces)
    return all(bool((piece == value).all()) for piece in pieces)


# -- what initialises one module -----------------------------------------------------------------


def torch_reset(model: nn.Module) -> Callable[[nn.Module], None]:
    """PyTorch's convention: a module initialises itself in `reset_parameters()`."""

    def init(module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    return init


def hugging_face(model: nn.Module) -> Callable[[nn.Module], None]:
    """transformers' convention: the model's `_init_weights(module)`, rotary buffers included.

    The model may be inside others, such as peft's. A quantised layer makes its own random values.
    What `_init_weights` leaves has the value that the model's constructor gives it; for the few
    models that have such tensors, each rank constructs the whole model on the CPU.
    """
    if transformers_model(model)[1] is None:
        raise ValueError(
            f"weights: {type(model).__name__} has no _init_weights, so it is no model of "
            f"transformers; choose another init, such as weights=torch"
        )
    initialize = initializer(model)
    prefix, base = transformers_model(model)
    paths = {id(m): base_fqn(n.removeprefix(prefix).lstrip(".")) for n, m in model.named_modules()}
    constructed: list[Any] = []

    def init(module: nn.Module) -> None:
        if hasattr(module, "fill_from"):
            module.reset_parameters()  # type: ignore[operator]
            return
        initialize(module)
        own = {**module._parameters, **module._buffers}
        left = {n: t for n, t in own.items() if t is not None and not t.is_meta and _is_unset(t)}
        if not left or id(module) not in paths:
            return
        if not constructed:
            constructed.append(_constructed(base))
        for name, tensor in left.items():
            try:
                value = getattr(constructed[0].get_submodule(paths[id(module)]), name)
            except AttributeError:
                continue  # an adapter's
            if value.shape == tensor.shape:
                tensor.copy_(value)

    return init


def _constructed(base: Any) -> Any:
    """A model of the class of `base` as its constructor leaves it, whole on the CPU."""
    from ditty_di.models.conversion import own_class

    config, seed = copy.deepcopy(base.config), torch.initial_seed()
    with torch.device("cpu"), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return own_class(base)(config)


def initializer(model: nn.Module) -> Callable[[nn.Module], None]:
    """The `_init_weights` of the innermost model of transformers that a module is in.

    A model may be made of others, such as a text and a vision model, each with its own.
    """
    owners: dict[int, Any] = {}

    def visit(module: nn.Module, owner: Any) -> None:
        owner = module if hasattr(type(module), "_init_weights") else owner
        owners[id(module)] = owner
        for child in module.children():
            visit(child, owner)

    outermost = transformers_model(model)[1]
    visit(model, outermost)
    return lambda module: owners.get(id(module), outermost)._init_weights(module)


def transformers_model(model: nn.Module) -> tuple[str, Any]:
    """(path, module) of the outermost model of transformers in it; ("", None) without one."""
    found = ((path, m) for path, m in model.named_modules() if hasattr(type(m), "_init_weights"))
    return next(found, ("", None))


def torchtitan(model: nn.Module) -> Callable[[nn.Module], None]:
    """torchtitan's convention: each module's own `param_init`, then its own buffers."""

    def init(module: nn.Module) -> None:
        titan: Any = module
        if hasattr(titan, "_init_self_parameters"):
            titan._init_self_parameters()
            titan._init_self_buffers(buffer_device=None)

    return init


# -- the weights slot -----------------------------------------------------------------------------


def initialize(
    model: nn.Module,
    /,
    *,
    device: torch.device,
    seed: int | None = None,
    init: Callable[[nn.Module], Callable[[nn.Module], None]] = torch_reset,
) -> None:
    """Initialises from random numbers that depend on the seed and each module's name only.

    Unit by unit (a repeated block, an embedding, ...), the unsharded tensors are made, initialised
    module by module with a generator seeded by (seed, name), and this rank's slices are copied
    into place: any number of ranks and any layout gives the same model, and no rank holds more
    than one unit unsharded.

    Args:
        seed: of all values; None is the run's seed (`ditty_di.seed`).
        init: takes the model, returns the function that initialises one module. It is called for
            children before their parents, as `nn.Module.apply` does.
    """
    seed = run_seed() if seed is None else seed
    init_module = init(model)
    done: set[int] = set()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type != "cpu" else []):
        for path, unit, whole_tree in _units(model):
            modules = list(unit.modules()) if whole_tree else [unit]
            names = {id(m): name for name, m in unit.named_modules(prefix=path)}
            with unsharded(modules, done):
                for module in reversed(modules):
                    torch.manual_seed(_seed(seed, canonical_fqn(names[id(module)])))
                    init_module(module)
            for name, child in [] if whole_tree else unit.named_children():
                torch.manual_seed(_seed(seed, canonical_fqn(f"{path}>{name}")))
                _reach(unit, child, init_module)


def _reach(parent: nn.Module, child: nn.Module, init_module: Callable[[nn.Module], None]) -> None:
    """What a module's own initialisation writes into a child, as T5's does into its embedding.

    The child's own parameters are whole for it, one child after another, and nothing else has
    values: so what it gets is the same whether it is sharded or not.
    """
    wholes = {
        id(p): torch.full(p.shape, _unset_value(p.dtype), dtype=p.dtype, device=local(p).device)
        for p in child.parameters(recurse=False)
    }
    if not wholes:
        return
    tables: list[dict[str, Any]] = [
        table for module in parent.modules() for table in (module._parameters, module._buffers)
    ]
    kept = [(table, name, x) for table in tables for name, x in table.items() if x is not None]
    for table, name, tensor in kept:
        scratch = wholes.get(id(tensor))
        scratch = torch.empty_like(local(tensor), device="meta") if scratch is None else scratch
        table[name] = nn.Parameter(scratch, requires_grad=False)
    try:
        init_module(parent)
    finally:
        for table, name, tensor in kept:
            table[name] = tensor
    for parameter in child.parameters(recurse=False):
        whole = wholes[id(parameter)]
        if not _is_unset(whole):
            local(parameter).copy_(whole[slices(parameter)])


# -- tensors and their shards ------------------------------------------------------------------


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, to be written to."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data


def slices(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def generator_for(seed: int, name: str) -> torch.Generator:
    """Random numbers on the CPU that depend on the seed and the name only."""
    return torch.Generator().manual_seed(_seed(seed, name))


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _units(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """(path, module, with all that is below it): largest subtrees without repeated blocks."""
    if not any(isinstance(m, nn.ModuleList | nn.ModuleDict) for m in model.modules()):
        yield path, model, True
        return
    for name, child in model.named_children():
        yield from _units(child, f"{path}.{name}" if path else name)
    yield path, model, False


class unsharded:
    """Within it, the modules' own sharded tensors are whole; then slices are copied back.

    Tensors in `done` (tied to one that has its values) are scratch within it, and stay as they
    were.
    """

    def __init__(self, modules: list[nn.Module], done: set[int]) -> None:
        self.modules, self.done = modules, done

    def __enter__(self) -> None:
        self.swapped: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        for module in self.modules:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) in self.done or isinstance(tensor, DTensor):
                        whole = torch.full(
                            tensor.shape,
                            _unset_value(tensor.dtype),
                            dtype=tensor.dtype,
                            device=local(tensor).device,
                        )
                        scratch = nn.Parameter(whole, requires_grad=False)
                        self.swapped.append((table, name, tensor, scratch))
                        table[name] = scratch
                    else:
                        self.done.add(id(tensor))

    def __exit__(self, *error: object) -> None:
        for table, name, tensor, whole in self.swapped:
            table[name] = tensor
            here = local(tensor)
            if id(tensor) not in self.done and here.numel():
                here.copy_(whole[slices(tensor)])
            self.done.add(id(tensor))
