"""Floating-point operations of training per token."""

from __future__ import annotations

from typing import Any

import yaml
from torch import nn

from ditty_di.cli.searchpath import conf_dir
from ditty_di.models.coverage import weights_of
from ditty_di.models.stacked import fused_weights
from ditty_di.models.weights import transformers_model


def per_token(model_parts: list[nn.Module]) -> float:
    """Return the FLOPs of a training step per token without attention scores: 6 N, frozen 4 N.

    A weight costs 2 operations a token in the forward pass, 2 for the gradient of its input and 2
    for its own gradient; a frozen one saves the last two (Kaplan et al. 2020, arXiv:2001.08361,
    section 2.1). Tables that are only looked up (`nn.Embedding`) cost none; one that is tied to the
    output projection is used there and counts. Of routed experts those of one token count
    (`active_share`). A linear layer that holds its weight packed (in integers) counts as unpacked.
    Recomputation is not counted, so that the figure can be used for *model* FLOPs utilization
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Args:
        model_parts: the modules as this rank trains them.
    """
    share = active_share(model_parts)
    weights: dict[int, nn.Parameter] = {}
    packed = 0.0
    for part in model_parts:
        for module in part.modules():
            own = [] if isinstance(module, nn.Embedding) else [*module.parameters(recurse=False)]
            if hasattr(module, "in_features") and any(not p.is_floating_point() for p in own):
                linear: Any = module
                elements = linear.in_features * linear.out_features
                packed += elements * share.get(id(own[0]), 1.0)
            else:
                weights |= {id(p): p for p in own}
    return 4.0 * packed + sum(
        (6 if p.requires_grad else 4) * p.numel() * share.get(id(p), 1.0) for p in weights.values()
    )


def active_share(model_parts: list[nn.Module]) -> dict[int, float]:
    """Return which share of a parameter a token uses, by `id`, for those of routed experts.

    Of E experts, a token goes to the `num_experts_per_tok` of the model's configuration; a model
    whose configuration has no such number uses all of them. Routed experts are modules with fused
    weights (`ditty_di.models.stacked`), with peft's adapters of these; shared ones are layers as
    any other, and always used.

    Args:
        model_parts: the modules as this rank trains them.
    """
    found: dict[int, float] = {}
    for part in model_parts:
        _, base = transformers_model(part)
        config = base.config.get_text_config() if hasattr(base, "config") else None
        of_a_token: Any = getattr(config, "num_experts_per_tok", None)
        shares: dict[nn.Module, float] = {}
        for _, experts, _ in fused_weights(part) if isinstance(of_a_token, int) else ():
            share = min(of_a_token / experts.num_experts, 1.0)  # type: ignore[operator]
            found |= {id(p): share for p in experts.parameters()}
            shares[experts] = share
        for module in part.modules() if shares else ():
            wrapper: Any = module
            if hasattr(wrapper, "parameter_name") and wrapper.get_base_layer() in shares:
                made = (getattr(wrapper, name) for name in wrapper.adapter_layer_names)
                own = (p for layers in made for p in layers.parameters())
                found |= {id(p): shares[wrapper.get_base_layer()] for p in own}
    return found


def parameters(model_parts: list[nn.Module]) -> tuple[int, int]:
    """Return the number of parameters, tied ones once, and of those that a token uses.

    Packed weights count as the elements that they stand for.

    Args:
        model_parts: the modules as this rank trains them.
    """
    share, total, active = active_share(model_parts), 0, 0.0
    for part in model_parts:
        for _, elements, tensors in weights_of(part):
            total += elements
            active += elements * share.get(id(tensors[0]), 1.0)
    return total, round(active)


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
