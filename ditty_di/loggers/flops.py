"""Floating-point operations of training per token."""

from __future__ import annotations

from typing import Any

import yaml
from torch import nn

from ditty_di.cli.searchpath import conf_dir


def per_token(model_parts: list[nn.Module]) -> float:
    """Return the FLOPs of a training step per token without attention scores: 6 N, frozen 4 N.

    A weight costs 2 operations a token in the forward pass, 2 for the gradient of its input and 2
    for its own gradient; a frozen one saves the last two (Kaplan et al. 2020, arXiv:2001.08361,
    section 2.1). Tables that are only looked up (`nn.Embedding`) cost none; one that is tied to the
    output projection is used there and counts. A linear layer that holds its weight packed (in
    integers) counts as unpacked. Recomputation is not counted, so that the figure can be used for
    *model* FLOPs utilization (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Args:
        model_parts: the modules as this rank trains them.
    """
    weights: dict[int, nn.Parameter] = {}
    packed = 0.0
    for part in model_parts:
        for module in part.modules():
            own = [] if isinstance(module, nn.Embedding) else [*module.parameters(recurse=False)]
            if hasattr(module, "in_features") and any(not p.is_floating_point() for p in own):
                linear: Any = module
                packed += linear.in_features * linear.out_features
            else:
                weights |= {id(p): p for p in own}
    return 4.0 * packed + sum((6 if p.requires_grad else 4) * p.numel() for p in weights.values())


def attention_per_token(*, num_layers: int, hidden_size: int, seq_len: int) -> float:
    """Return the FLOPs of the attention scores per token, `12 L d T`.

    As in arXiv:2204.02311, appendix B, they are not halved for causal masks.

    Args:
        num_layers: L.
        hidden_size: d.
        seq_len: T, in tokens.
    """
    return 12.0 * num_layers * hidden_size * seq_len


def peak(device_name: str) -> float | None:
    """Return the peak of a device in FLOP/s, dense matrix products in bfloat16; None if unknown.

    The figures are those of `task=plan`, in conf/device.

    Args:
        device_name: as `torch.cuda.get_device_name()` returns it.
    """
    for file in sorted((conf_dir() / "device").glob("*.yaml")):
        device = yaml.safe_load(file.read_text(encoding="utf-8"))
        if device_name in device.get("torch_names", ()):
            return float(device["tflops"]["bfloat16"]) * 1e12
    return None
