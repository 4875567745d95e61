"""Which layers of a model an adapter goes to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

#: What `target_modules` says for every linear layer but the output head.
ALL_LINEAR = "all-linear"


def is_quantized(module: Any) -> bool:
    """Whether it is a linear layer whose weight is packed (see `ditty_di.quantization`)."""
    return hasattr(module, "dequantize") and hasattr(module, "fill_from")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by path: plain, transposed as in GPT-2, and quantised ones."""
    from transformers.pytorch_utils import Conv1D

    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or is_quantized(module)
    }


def all_linear(model: nn.Module, *, except_for: Iterable[str] = ()) -> list[str]:
    """Every linear layer but the output head: those of the blocks where nobody says which it is.

    Args:
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
    chosen = [path for path in found if not any(matches(name, path) for name in except_for)]
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
    """The linear layers of the repeated blocks, or all but the head where there are no blocks."""
    chosen = [path for path in linear_layers(model) if _in_block(model, path)]
    return shortest(model, chosen) if chosen else all_linear(model)


def require_matches(
    model: nn.Module, field: str, names: str | Iterable[str], *, among: Iterable[str] | None = None
) -> None:
    """Every name must be that of a module, or of one's end; a string is one regular expression.

    Raises:
        ValueError: listing what there is.
    """
    paths = [path for path, _ in model.named_modules() if path]
    if isinstance(names, str):
        if not any(re.fullmatch(names, path) for path in paths):
            raise ValueError(
                f"adapter: {field}={names!r} is a regular expression that matches the whole path "
                f"of no module; one of them is {next(iter(linear_layers(model)), paths[-1])!r}"
            )
        return
    known = sorted({path.rpartition(".")[2] for path in among or linear_layers(model)})
    for name in names:
        if not any(matches(name, path) for path in paths):
            ends = {path.rpartition(".")[2] for path in paths}
            near = difflib.get_close_matches(name, {*known, *ends}, 1, 0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"adapter: {field} has {name!r}, but no module of {type(model).__name__} is called "
                f"so{hint}; it has {', '.join(known)}"
            )


def matches(name: str, path: str) -> bool:
    """As peft compares a name in a list with a module's path."""
    return path == name or path.endswith(f".{name}")


def shortest(model: nn.Module, paths: list[str]) -> list[str]:
    """The same modules by their last names, where those name nothing else in the model."""
    chosen, ends = set(paths), {path.rpartition(".")[2] for path in paths}
    for path, _ in model.named_modules():
        if path not in chosen:
            ends.discard(path.rpartition(".")[2])
    rest = [path for path in paths if path.rpartition(".")[2] not in ends]
    return sorted({*ends, *rest})


def _in_block(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    above = (".".join(parts[:i]) for i in range(len(parts)))
    return any(isinstance(model.get_submodule(p), nn.ModuleList | nn.ModuleDict) for p in above)
