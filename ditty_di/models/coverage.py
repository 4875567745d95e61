"""Describe how much of a model a transform does not change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn


def left_out(model: nn.Module, taken: Iterable[Tensor]) -> tuple[str, list[str]]:
    """Return which of the model's parameters are not among `taken`, and the fused ones of them.

    Args:
        model: whose parameters are compared.
        taken: those that the transform changes.

    Returns:
        A text that names each group with at least 1 % of all parameters
        (`model.layers.*.mlp.experts.down_proj (31 %)`), the largest first, empty if there are
        none; and parts of the names of those with three dimensions or more, such as experts.
    """
    has = {id(parameter) for parameter in taken}
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    sizes: Counter[str] = Counter()
    fused: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in has:
            pattern = re.sub(r"\.\d+\.", ".*.", name)
            sizes[pattern] += parameter.numel()
            if parameter.dim() > 2:
                fused[pattern] = pattern.rpartition("*.")[2]
    shown = [(name, size) for name, size in sizes.most_common() if size >= 0.01 * total]
    if not shown:
        return "", []
    parts = ", ".join(f"{name} ({100 * size / total:.0f} %)" for name, size in shown)
    text = f"{100 * sizes.total() / total:.0f} % of the parameters: {parts}"
    return text, [fused[name] for name, _ in shown if name in fused]
