"""First values of adapters, on any layout: what the files of the base do not have."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ditty_di.adapters.state import NAME, peft_model
from ditty_di.adapters.targets import is_quantized
from ditty_di.models.weights import (
    generator_for,
    hugging_face,
    local,
    slices,
    torch_reset,
    transformers_model,
)
from ditty_di.names import base_fqn, canonical_fqn
from ditty_di.seed import run_seed


def initialize(
    model: nn.Module, names: list[str], /, *, device: torch.device, seed: int | None = None
) -> None:
    """Gives adapters the values that peft starts from, the same on any layout.

    Random values depend on `seed` and the layer's name only. LoRA's second matrix is zero, so that
    the first step's output is the base's. DoRA's magnitudes are the norms of the base's rows, of
    each rank's own; trainable tokens start as the base has them. Any other kind of layer starts by
    its own `reset_..._parameters`. What the base lacks of `modules_to_save`, such as the head of a
    classifier, is initialised as the base's library does it.

    Args:
        seed: of random values; None is the run's seed (`ditty_di.seed`).
        names: of parameters and saved buffers without a value; all others have theirs.

    Raises:
        ValueError: something of `names` that nobody knows how to start, on all ranks alike.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    seed = run_seed() if seed is None else seed
    left = set(names)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type != "cpu" else []):
        for path, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                own = left & set(_own_names(path, layer))
                left -= own
                own -= _from_base(layer, path)
                if own:
                    torch.manual_seed(_seed(seed, canonical_fqn(path)))
                    with _whole(model, own):
                        _reset(layer, path, peft_model(model).peft_config[NAME])
        _start_copies(model, left, seed)


def _start_copies(model: nn.Module, names: set[str], seed: int) -> None:
    """Modules that are trained whole and that the base lacks, and their untrained originals."""
    if of_base := [
        n for n in sorted(names) if not {"modules_to_save", "original_module"} & {*n.split(".")}
    ]:
        raise ValueError(
            f"adapters: the base's files do not have {', '.join(of_base[:5])}, and these are no "
            f"adapters; what the base lacks must be in modules_to_save"
        )
    init = hugging_face if transformers_model(model)[1] is not None else torch_reset
    for path, own in _by_module(names).items():
        torch.manual_seed(_seed(seed, base_fqn(path)))
        with _whole(model, own):
            init(model)(model.get_submodule(path))


def _own_names(path: str, layer: Any) -> Iterator[str]:
    """Names of what a layer has beside the layer that it wraps."""
    for name, _ in [*layer.named_parameters(), *layer.named_buffers()]:
        if not name.startswith("base_layer."):
            yield f"{path}.{name}" if path else name


def _by_module(names: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name in sorted(names):
        found[name.rpartition(".")[0]].add(name)
    return found


def _seed(seed: int, name: str) -> int:
    return generator_for(seed, name).initial_seed()


# -- starts that do not depend on the base --------------------------------------------------------


def _reset(layer: Any, path: str, config: Any) -> None:
    """PyTorch's start of each module in the layer, then peft's of the layer."""
    for name, module in layer.named_modules():
        base = not name or name == "base_layer" or name.startswith("base_layer.")
        reset = None if base else getattr(module, "reset_parameters", None)
        if reset is not None and next(module.parameters(), None) is not None:
            reset()
    if getattr(config, "init_lora_weights", True) == "orthogonal":
        layer.orthogonal_init(NAME)
        return
    resets = [
        method
        for name, method in inspect.getmembers(layer, inspect.ismethod)
        if re.fullmatch(r"reset_(\w+_)?parameters", name)
        and "adapter_name" in inspect.signature(method).parameters
    ]
    starts = {k: v for k, v in vars(config).items() if re.fullmatch(r"init_(\w+_)?weights", k)}
    for method in resets:
        options = [p for p in inspect.signature(method).parameters if p != "adapter_name"]
        untold = [f"{k}={v}" for k, v in starts.items() if v is not True and k not in options]
        unknown = [option for option in options if not hasattr(config, option)]
        if len(resets) > 1 or untold or unknown:
            how = f"with {', '.join(untold or unknown)}" if untold or unknown else "in several ways"
            raise ValueError(
                f"adapters: {type(layer).__name__} at {path} starts {how}, by what peft does only "
                f"while it makes the layer; init_weights=true, or LoraConfig, can be made here"
            )
        method(adapter_name=NAME, **{option: getattr(config, option) for option in options})


@contextmanager
def _whole(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Within it, the modules that own `names` have whole tensors; then slices are copied back.

    What else these modules own is scratch within it and stays as it was.

    Raises:
        ValueError: one of `names` was not set.
    """
    swapped: list[tuple[dict[str, Any], str, str, Tensor]] = []
    for path in _by_module(names):
        module = model.get_submodule(path)
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for own, tensor in table.items():
                if tensor is not None:
                    swapped.append((table, own, f"{path}.{own}".lstrip("."), tensor))
                    table[own] = _scratch(tensor)
    try:
        yield
        made = {name: table[own] for table, own, name, _ in swapped}
    finally:
        for table, own, _, tensor in swapped:
            table[own] = tensor
    not_set = [n for n in sorted(names) if not made[n].is_floating_point() or made[n].isnan().any()]
    if not_set:
        raise ValueError(
            f"adapters: nobody knows how to start {', '.join(not_set[:5])}; a kind of adapter with "
            f"reset_..._parameters in its layers would, such as LoraConfig or IA3Config"
        )
    for _, _, name, tensor in swapped:
        if name in names and local(tensor).numel():
            local(tensor).copy_(made[name][slices(tensor)])


def _scratch(tensor: Tensor) -> Tensor:
    unset = torch.nan if tensor.is_floating_point() else 0
    whole = torch.full(tensor.shape, unset, dtype=tensor.dtype, device=local(tensor).device)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(whole, requires_grad=False) if is_parameter else whole


# -- starts that do -------------------------------------------------------------------------------


def _from_base(layer: Any, path: str) -> set[str]:
    """Sets what is computed from the layer's base; the names of that."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    found = set()
    for name, module in layer.named_modules():
        if isinstance(module, DoraLinearLayer):
            _set_magnitude(module, layer.get_base_layer(), f"{path}.{name}")
            found.add(f"{path}.{name}.weight")
    if isinstance(layer, TrainableTokensLayer) and not layer.tied_adapter:
        embedding: Any = layer.get_base_layer()
        rows = _rows(embedding.weight, layer.token_indices[NAME])
        trained = layer.trainable_tokens_delta[NAME]
        local(trained).copy_(rows[slices(trained)])
        layer.trainable_tokens_original[NAME].copy_(rows)
        found.add(f"{path}.trainable_tokens_delta.{NAME}")
    if isinstance(layer, LNTuningLayer):
        base = dict(layer.get_base_layer().named_parameters())
        for name, parameter in layer.ln_tuning_layers[NAME].named_parameters():
            local(parameter).copy_(local(base[name]))
            found.add(f"{path}.ln_tuning_layers.{NAME}.{name}")
    return found


def _set_magnitude(dora: Any, base: Any, path: str) -> None:
    """DoRA's magnitude: norms over all but the output dimension (https://arxiv.org/abs/2402.09353).

    With rows of the weight and of the magnitude on the same ranks, nothing travels.
    """
    target, plain = dora.weight, None if is_quantized(base) else base.weight
    here = local(target)
    if plain is None:
        weight = base.dequantize()
        # bitsandbytes' layers are never sharded.
        held = slices(getattr(base, "qweight", weight))[0]
    elif plain.dim() == 2 and not dora.fan_in_fan_out:
        weight, held = local(plain), slices(plain)[0]
    else:  # convolutions, embeddings, transposed weights: rows are something else, so all of it
        weight = plain.full_tensor() if isinstance(plain, DTensor) else plain
        norms = dora.get_weight_norm(weight.to(here.dtype), weight.new_zeros(()), 0)
        here.copy_(norms.reshape(target.shape)[slices(target)])
        return
    if held != slices(target)[0]:
        raise ValueError(
            f"adapters: this rank has other rows of {path} than of the weight beside it; shard "
            f"both by rows, as ditty_di.parallelize.data_parallel.shard does"
        )
    here.copy_(weight.to(here.dtype).norm(dim=1))


def _rows(weight: Tensor, indices: list[int]) -> Tensor:
    """Rows `[len(indices), ...]` of a weight that may be sharded by rows, whole on every rank."""
    held, here = slices(weight)[0], local(weight)
    rows = torch.zeros(len(indices), *weight.shape[1:], dtype=here.dtype, device=here.device)
    for i, index in enumerate(indices):
        if held.start <= index < held.stop:
            rows[i] = here[index - held.start]
    if isinstance(weight, DTensor):
        for dimension, placement in enumerate(weight.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(rows, group=weight.device_mesh.get_group(dimension))
    return rows
