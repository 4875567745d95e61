"""Initialize adapters on any layout: tensors that the files of the base do not have."""

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
from ditty_di.fqn import base_fqn, canonical_fqn
from ditty_di.messages import first_of
from ditty_di.models.heads import head_of
from ditty_di.models.weights import (
    hugging_face,
    local,
    slices,
    swapped,
    torch_reset,
    transformers_model,
    uninitialized_like,
)
from ditty_di.seed import derived_seed, run_seed, seed_torch


def initialize(
    model: nn.Module, names: list[str], /, *, device: torch.device, seed: int | None = None
) -> None:
    """Initialize adapters as peft does, with the same values on any layout.

    Random values depend on `seed` and the layer's name only. LoRA's second matrix is zero, so that
    the first step's output is the base's. DoRA's magnitudes are the norms of the base's rows, of
    each rank's own; trainable tokens start as the base has them. Any other kind of layer starts by
    its own `reset_..._parameters`. What the base lacks of `modules_to_save`, such as the head of a
    classifier, is initialized as the base's library does it.

    Args:
        model: with adapters; all tensors but `names` have their values.
        names: of parameters and persistent buffers without a value.
        device: of the model.
        seed: of random values; None is the run's seed (`ditty_di.seed`).

    Raises:
        ValueError: one of `names` cannot be initialized, on all ranks alike.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    seed = run_seed() if seed is None else seed
    left = set(names)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type != "cpu" else []):
        for path, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                own = left & set(_own_names(path, layer))
                left -= own
                own -= _init_from_base(layer, path)
                if own:
                    seed_torch(derived_seed(seed, canonical_fqn(path)), device)
                    with _whole(model, own):
                        _reset(layer, path, peft_model(model).peft_config[NAME])
        _init_copies(model, left, seed, device)


def _init_copies(model: nn.Module, names: set[str], seed: int, device: torch.device) -> None:
    """Initialize a new head, and modules that are trained whole and that the base lacks.

    Of the latter the originals too. A head may be new without adapters.
    """
    copies = {"modules_to_save", "original_module"}
    of_base = [name for name in sorted(names) if not copies & {*name.split(".")}]
    if of_base := [name for name in of_base if not head_of(model, name)]:
        raise ValueError(
            f"adapters: the base's files do not have {first_of(of_base, 5)}, and these are not "
            f"adapters; what the base lacks must be in modules_to_save"
        )
    init = hugging_face if transformers_model(model)[1] is not None else torch_reset
    for path, own in _by_module(names).items():
        seed_torch(derived_seed(seed, base_fqn(path)), device)
        with _whole(model, own):
            init(model)(model.get_submodule(path))


def _own_names(path: str, layer: Any) -> Iterator[str]:
    """Yield the names of what a layer has beside the layer that it wraps."""
    for name, _ in [*layer.named_parameters(), *layer.named_buffers()]:
        if not name.startswith("base_layer."):
            yield f"{path}.{name}" if path else name


def _by_module(names: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name in sorted(names):
        found[name.rpartition(".")[0]].add(name)
    return found


@contextmanager
def _whole(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Make the tensors of the modules that own `names` whole, then copy slices of `names` back.

    Raises:
        ValueError: one of `names` was not set.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    wanted = {id(getattr(owner, name.rpartition(".")[2])): name for name, owner in owners.items()}
    with swapped(dict.fromkeys(owners.values()), uninitialized_like) as pairs:
        yield
    made = {wanted[id(own)]: (own, new) for own, new in pairs if id(own) in wanted}
    if not_set := [
        name
        for name, (_, new) in sorted(made.items())
        if not new.is_floating_point() or new.isnan().any()
    ]:
        raise ValueError(
            f"adapters: it is unknown how to initialize {first_of(not_set, 5)}; use a kind of "
            f"adapter whose layers have reset_..._parameters, such as LoraConfig or IA3Config"
        )
    for own, new in made.values():
        if local(own).numel():
            local(own).copy_(new[slices(own)])


# -- initializations that do not depend on the base -----------------------------------------------


def _reset(layer: Any, path: str, config: Any) -> None:
    """Run PyTorch's initialization of each module in the layer, then peft's of the layer."""
    for name, module in layer.named_modules():
        is_base = not name or name == "base_layer" or name.startswith("base_layer.")
        reset = None if is_base else getattr(module, "reset_parameters", None)
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
        unused = [f"{k}={v}" for k, v in starts.items() if v is not True and k not in options]
        unknown = [option for option in options if not hasattr(config, option)]
        if len(resets) > 1 or unused or unknown:
            how = f"with {', '.join(unused or unknown)}" if unused or unknown else "in several ways"
            raise ValueError(
                f"adapters: {type(layer).__name__} at {path} starts {how}, by what peft does only "
                f"while it makes the layer; init_weights=true, or LoraConfig, can be made here"
            )
        method(adapter_name=NAME, **{option: getattr(config, option) for option in options})


# -- initializations from the base's values -------------------------------------------------------


def _init_from_base(layer: Any, path: str) -> set[str]:
    """Set what is computed from the layer's base; return the names of that."""
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
    """Set DoRA's magnitude: norms over all but the output dimension (arXiv:2402.09353).

    With rows of the weight and of the magnitude on the same ranks, nothing is communicated.
    """
    target, plain = dora.weight, None if is_quantized(base) else base.weight
    here = local(target)
    if plain is None:
        weight = base.dequantize()
        # bitsandbytes' layers are never sharded.
        held = slices(getattr(base, "qweight", weight))[0]
    elif plain.dim() == 2 and not dora.fan_in_fan_out:
        weight, held = local(plain), slices(plain)[0]
    else:  # convolutions, embeddings, transposed weights: their rows are not outputs, so all of it
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
    """Return rows `[len(indices), ...]` of a weight that may be sharded by rows, on every rank."""
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
