"""Find the layers of a model that an adapter changes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ditty_di.models.coverage import within_block
from ditty_di.models.routers import router_layers
from ditty_di.models.stacked import Stacked, fused_weights, is_linear
from ditty_di.models.towers import language_model_paths

#: The value of `target_modules` for every linear layer but the output head.
ALL_LINEAR = "all-linear"


def is_quantized(module: Any) -> bool:
    """Return whether it is a linear layer whose weight is packed (`ditty_di.quantization`)."""
    packed = hasattr(module, "dequantize") and hasattr(module, "fill_from")
    return packed and not isinstance(module, Stacked)


def paths(model: nn.Module) -> list[str]:
    """Return the paths of all modules inside the model, without packed parameters."""
    return [path for path, m in model.named_modules() if path and not isinstance(m, Stacked)]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers by path: plain, transposed as in GPT-2, and quantized ones."""
    return {
        path: module
        for path, module in model.named_modules()
        if is_linear(module) or isinstance(module, Conv1D) or is_quantized(module)
    }


def all_linear(model: nn.Module, *, except_for: Iterable[str] = ()) -> list[str]:
    """Return names for every linear layer but the output head and the routers of experts.

    Without a known output head these are the linear layers of the repeated blocks; in a multimodal
    model those of its language model.

    Args:
        model: without adapters.
        except_for: names of modules that are trained whole.

    Raises:
        ValueError: there are none.
    """
    found = linear_layers(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        found = {path: module for path, module in found.items() if module is not head}
    elif inside := {path: m for path, m in found.items() if _in_block(model, path)}:
        found = inside
    apart, is_inside = router_layers(model), language_model_paths(model)
    chosen = [
        path
        for path in found
        if path not in apart
        if is_inside(path)
        if not any(matches(name, path) for name in except_for)
    ]
    if not chosen:
        raise ValueError(
            f"adapter: {type(model).__name__} has no linear layer beside its output head; name the "
            f"layers in target_modules"
        )
    return shortest(model, chosen)


def layers_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the linear layers that `target_modules=names` adapts."""
    found = linear_layers(model)
    return [m for path, m in found.items() if any(matches(name, path) for name in names)]


def blocks_linear(model: nn.Module) -> list[str]:
    """Return names for the linear layers of repeated blocks; without blocks all but the head."""
    is_inside = language_model_paths(model)
    chosen = [p for p in linear_layers(model) if _in_block(model, p) and is_inside(p)]
    return shortest(model, chosen) if chosen else all_linear(model)


def require_matches(
    model: nn.Module, field: str, names: str | Iterable[str], *, among: Iterable[str] | None = None
) -> None:
    """Check that every name is the path of a module, or the end of one.

    Args:
        model: whose modules are searched.
        field: the argument that has the names, for the error message.
        names: a string is one regular expression that matches whole paths.
        among: paths whose last names the error message lists; None is the linear layers.

    Raises:
        ValueError: a name without a module.
    """
    known = paths(model)
    if isinstance(names, str):
        if not any(re.fullmatch(names, path) for path in known):
            raise ValueError(
                f"adapter: {field}={names!r} is a regular expression that matches the whole path "
                f"of no module; one of them is {next(iter(linear_layers(model)), known[-1])!r}"
            )
        return
    listed = sorted({path.rpartition(".")[2] for path in among or linear_layers(model)})
    for name in names:
        if not any(matches(name, path) for path in known):
            ends = {path.rpartition(".")[2] for path in known}
            near = difflib.get_close_matches(name, {*listed, *ends}, 1, 0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"adapter: {field} has {name!r}, but no module of {type(model).__name__} is called "
                f"so{hint}; it has {', '.join(listed)}"
            )


def weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) as `target_parameters` names them, with those of packed weights."""
    found = list(model.named_parameters())
    for path, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            name = path if isinstance(layer, Stacked) else f"{path}.weight"
            found += [(name, parameter) for parameter in layer.parameters()]
    return found


def require_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Check that every name in `target_parameters` is that of a parameter, or the end of one.

    Raises:
        ValueError: a name without a parameter.
    """
    known = [name for name, _ in weights(model)]
    for name in names:
        if not any(matches(name, path) for path in known):
            fused = sorted({within_block(path) for path, _, _ in fused_weights(model)})
            near = difflib.get_close_matches(name, fused, 1, 0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"adapter: target_parameters has {name!r}, but no parameter of "
                f"{type(model).__name__} is called so{hint}"
            )


def matches(name: str, path: str) -> bool:
    """Return whether a name in a list means the module at a path, as peft compares them."""
    return path == name or path.endswith(f".{name}")


def shortest(model: nn.Module, chosen: list[str]) -> list[str]:
    """Return the same modules by their last names, where those mean nothing else in the model."""
    others = {path.rpartition(".")[2] for path in paths(model) if path not in set(chosen)}
    ends = {path.rpartition(".")[2] for path in chosen} - others
    rest = [path for path in chosen if path.rpartition(".")[2] not in ends]
    return sorted({*ends, *rest})


def _in_block(model: nn.Module, path: str) -> bool:
    """Return whether a module is inside a list or dict of modules."""
    parts = path.split(".")
    above = (".".join(parts[:i]) for i in range(len(parts)))
    return any(isinstance(model.get_submodule(p), nn.ModuleList | nn.ModuleDict) for p in above)
