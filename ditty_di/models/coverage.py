"""How much of a model a transform leaves as it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn


def left_out(model: nn.Module, taken: Iterable[Tensor]) -> tuple[str, list[str]]:
    """Return how much of the model's parameters are not among `taken`, and the fused ones of them.

    The text names each that has at least 1 % (`model.layers.*.mlp.experts.down_proj (31 %)`), the
    largest first, and is empty where none has. Fused are parameters of three dimensions or more
    with at least 1 %, such as a stack of experts; they come as parts of paths that name them.
    """
    has = {id(parameter) for parameter in taken}
    every = list(model.named_parameters())
    whole = sum(parameter.numel() for _, parameter in every) or 1
    sizes: Counter[str] = Counter()
    fused: dict[str, str] = {}
    for name, parameter in every:
        if id(parameter) not in has:
            pattern = re.sub(r"\.\d+\.", ".*.", name)
            sizes[pattern] += parameter.numel()
            if parameter.dim() > 2:
                fused[pattern] = pattern.rpartition("*.")[2]
    shown = [(name, size) for name, size in sizes.most_common() if size >= 0.01 * whole]
    if not shown:
        return "", []
    text = f"{_percent(sizes.total(), whole)} of the parameters: " + ", ".join(
        f"{name} ({_percent(size, whole)})" for name, size in shown
    )
    return text, [fused[name] for name, _ in shown if name in fused]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"
