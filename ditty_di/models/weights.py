"""Filling a parallelised model: the same values on any layout, slice by slice.

A model comes here with its parameters allocated and uninitialised (`materialize` fills them with
NaN, so that a value which nobody set is found before the first step, not in the loss).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.names import canonical_fqn


def is_meta(model: nn.Module) -> bool:
    """Whether anything of the model still has no memory."""
    return any(t.is_meta for _, t in _tensors(model))


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives every meta tensor of the model memory on `device`, filled with NaN.

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
            local = _local(tensor)
            if local.is_floating_point():
                local.fill_(torch.nan)


def unset(model: nn.Module) -> list[str]:
    """Names of parameters and buffers that are on meta or hold NaN."""
    return [
        name
        for name, tensor in _tensors(model)
        if tensor.is_meta or (tensor.is_floating_point() and _local(tensor).isnan().any())
    ]


# -- what initialises one module -----------------------------------------------------------------


def torch_reset(model: nn.Module) -> Callable[[nn.Module], None]:
    """PyTorch's convention: a module initialises itself in `reset_parameters()`."""

    def init(module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    return init


def hugging_face(model: nn.Module) -> Callable[[nn.Module], None]:
    """transformers' convention: the model's `_init_weights(module)`, rotary buffers included."""
    return model._init_weights  # type: ignore[return-value]


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
    seed: int = 0,
    init: Callable[[nn.Module], Callable[[nn.Module], None]] = torch_reset,
) -> None:
    """Initialises from random numbers that depend on the seed and each module's name only.

    Unit by unit (a repeated block, an embedding, ...), the unsharded tensors are made, initialised
    module by module with a generator seeded by (seed, name), and this rank's slices are copied
    into place: any number of ranks and any layout gives the same model, and no rank holds more
    than one unit unsharded.

    Args:
        seed: of all values.
        init: takes the model, returns the function that initialises one module. It is called for
            children before their parents, as `nn.Module.apply` does.
    """
    init_module = init(model)
    done: set[int] = set()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type != "cpu" else []):
        for path, unit, whole_tree in _units(model):
            modules = list(unit.modules()) if whole_tree else [unit]
            names = {id(m): name for name, m in unit.named_modules(prefix=path)}
            with _unsharded(modules, done):
                for module in reversed(modules):
                    torch.manual_seed(_seed(seed, canonical_fqn(names[id(module)])))
                    init_module(module)


def pretrained(model: nn.Module, /, *, device: torch.device, path: str) -> None:
    """Reads a folder of safetensors; each rank reads only its own slices.

    Buffers that are not saved (rotary frequencies) are recomputed by the model's `_init_weights`.

    Raises:
        FileNotFoundError: no safetensors in `path`.
        ValueError: a parameter that the files lack, or has another shape there.
    """
    init_module = hugging_face(model)
    files = Safetensors(path)
    problems = []
    saved = {canonical_fqn(name) for name in model.state_dict()}
    with torch.no_grad():
        for module in model.modules():
            if module._buffers and not module._parameters:
                init_module(module)
        for raw, tensor in _tensors(model):
            name = canonical_fqn(raw)
            if name in saved:
                problems += files.copy_into(name, tensor)
    if problems:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"weights: {path} does not fit the model:\n  {shown}")


class Safetensors:
    """The tensors of a folder (one file, or several with an index), read by slices."""

    def __init__(self, path: str) -> None:
        from safetensors import safe_open

        folder = _snapshot(path)
        names = sorted(folder.glob("*.safetensors"))
        if not names:
            raise FileNotFoundError(
                f"weights: no .safetensors file in {folder}; give a folder that "
                f"`save_pretrained` wrote"
            )
        self._files = [safe_open(name, "pt") for name in names]
        self._where = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118

    def copy_into(self, name: str, target: Tensor) -> list[str]:
        """Copies this rank's slice of `name` into `target`; what is wrong, if anything is."""
        if name not in self._where:
            return [f"{name}: not in the files"]
        source = self._where[name].get_slice(name)
        if tuple(source.get_shape()) != tuple(target.shape):
            return [f"{name}: {source.get_shape()} there, {list(target.shape)} in the model"]
        local = _local(target)
        if local.numel():
            index = _slices(target)
            local.copy_(source[index] if index else source[...])
        return []


def _snapshot(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.count("/") != 1:
        raise FileNotFoundError(f"weights: there is no folder {folder}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))


# -- tensors and their shards ------------------------------------------------------------------


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data


def _slices(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


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


class _unsharded:
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
                            torch.nan,
                            dtype=tensor.dtype,
                            device=_local(tensor).device,
                        )
                        scratch = nn.Parameter(whole, requires_grad=False)
                        self.swapped.append((table, name, tensor, scratch))
                        table[name] = scratch
                    else:
                        self.done.add(id(tensor))

    def __exit__(self, *error: object) -> None:
        for table, name, tensor, whole in self.swapped:
            table[name] = tensor
            local = _local(tensor)
            if id(tensor) not in self.done and local.numel():
                local.copy_(whole[_slices(tensor)])
            self.done.add(id(tensor))
