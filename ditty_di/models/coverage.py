"""Describe how much of a model is trained, adapted or quantized, and what is left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ditty_di.fqn import base_fqn
from ditty_di.models.stacked import fused_weights


def left_out(model: nn.Module, taken: Iterable[Tensor]) -> tuple[str, list[str]]:
    """Return which of the model's weights are not among `taken`, and the fused ones of them.

    Args:
        model: whose weights are compared.
        taken: parameters of those that the transform changes.

    Returns:
        A text that names each group with at least 1 % of all elements
        (`model.layers.*.mlp.experts.down_proj (31 %)`), the largest first, empty if there are
        none; and parts of the names of those that hold the matrices of several experts.
    """
    has = {id(parameter) for parameter in taken}
    weights = list(weights_of(model))
    rest = [(name, size) for name, size, parameters in weights if not has & {*map(id, parameters)}]
    total = sum(size for _, size, _ in weights)
    shown, share = _largest(rest, total)
    fused = {_pattern(base_fqn(path)) for path, _, _ in fused_weights(model)}
    parts = ", ".join(f"{name} ({100 * size / total:.0f} %)" for name, size in shown)
    text = f"{100 * share:.0f} % of the parameters: {parts}" if shown else ""
    return text, [within_block(name) for name, _ in shown if name in fused]


def summary(model: nn.Module) -> str:
    """Return how many parameters a model has, and the shares trained, adapted and quantized.

    A packed weight counts as the elements that it stands for. Groups with at least 1 % of the
    base's elements that are neither trained nor adapted are named.
    """
    added, adapted = _adapters(model)
    total = trained = quantized = under = 0
    rest = []
    for name, size, parameters in weights_of(model):
        ids = {*map(id, parameters)}
        is_trained = any(p.requires_grad for p in parameters)
        trained += size * is_trained
        if ids & added:
            continue
        total += size
        quantized += size * any(not p.is_floating_point() for p in parameters)
        under += size * bool(ids & adapted)
        if not is_trained and not ids & adapted:
            rest.append((name, size))
    text = f"{_number(total)} parameters, {_number(trained)} trained"
    for share, what in ((under, "adapted"), (quantized, "quantized")):
        text += f", {100 * share / max(1, total):.1f} % {what}" if share else ""
    shown, _ = _largest(rest, total)
    parts = ", ".join(f"{name} ({100 * size / total:.0f} %)" for name, size in shown)
    return text + (f"; neither trained nor adapted: {parts}" if shown else "")


def weights_of(model: nn.Module) -> Iterator[tuple[str, int, list[nn.Parameter]]]:
    """Yield (name in the base, elements, parameters) of each weight, tied ones once.

    A packed weight has several parameters, and counts as the elements that it stands for.

    Args:
        model: with or without adapters.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None and id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        packed: Any = module
        if hasattr(module, "fill_from"):
            parts = [p for name, p in own.items() if name != "bias"]
            own = {name: p for name, p in own.items() if name == "bias"}
            name = path if hasattr(module, "multiply") else f"{path}.weight"
            yield base_fqn(name), packed.in_features * packed.out_features, parts
        for name, parameter in own.items():
            yield base_fqn(f"{path}.{name}".lstrip(".")), parameter.numel(), [parameter]


def _adapters(model: nn.Module) -> tuple[set[int], set[int]]:
    """Return the ids of the parameters of peft's layers, and of the weights that these adapt."""
    added: set[int] = set()
    adapted: set[int] = set()
    for module in model.modules():
        layer: Any = module
        for name in getattr(layer, "adapter_layer_names", ()):
            made = getattr(layer, name, None)
            if isinstance(made, nn.Module):
                added |= {id(p) for p in made.parameters()}
        if isinstance(getattr(layer, "modules_to_save", None), nn.ModuleDict):
            added |= {id(p) for p in layer.modules_to_save.parameters()}
            adapted |= {id(p) for p in layer.original_module.parameters()}
        elif hasattr(layer, "adapter_layer_names") and hasattr(layer, "get_base_layer"):
            base = layer.get_base_layer()
            base = getattr(base, getattr(layer, "parameter_name", ""), base)
            own = [base] if isinstance(base, nn.Parameter) else base.parameters()
            adapted |= {id(p) for p in own}
    return added, adapted - added


def _largest(weights: list[tuple[str, int]], total: int) -> tuple[list[tuple[str, int]], float]:
    """Return the groups of layers with at least 1 % of `total`, and the share of all."""
    sizes: Counter[str] = Counter()
    for name, size in weights:
        sizes[_pattern(name)] += size
    shown = [(name, size) for name, size in sizes.most_common() if size >= 0.01 * max(1, total)]
    return shown, sizes.total() / max(1, total)


def within_block(name: str) -> str:
    """Return what is behind the last number of a layer: `mlp.experts.down_proj`."""
    return _pattern(name).rpartition("*.")[2]


def _pattern(name: str) -> str:
    """Return a name with the number of the layer left out."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _number(count: int) -> str:
    """Return a count with three digits: 1.24 B."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
