"""Transforms that replace a model's linear layers by frozen ones of 4 or 8 bits.

Each takes a model on the meta device, whose values are quantized while they are read
(`ditty_di.models.pretrained.Pretrained`), or a model with values. The other parameters, and a head
that may be new (`ditty_di.models.heads`), stay unchanged; an adapter freezes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.dtypes import dtype_name
from ditty_di.models.coverage import left_out
from ditty_di.models.heads import head_of
from ditty_di.models.routers import router_layers, routers
from ditty_di.models.stacked import fused_weights, is_linear
from ditty_di.models.towers import language_model_paths
from ditty_di.quantization.experts import Int8Experts, NF4Experts
from ditty_di.quantization.int8_linear import Int8Linear
from ditty_di.quantization.linear import require_bitsandbytes
from ditty_di.quantization.nf4_linear import NF4Linear

__all__ = ["bitsandbytes_int8", "bitsandbytes_nf4", "int8", "nf4"]

log = logging.getLogger(__name__)


def nf4(
    model: nn.Module,
    /,
    *,
    skip: Sequence[str] = ("lm_head",),
    include: Sequence[str] = (),
    block_size: int = 64,
    double_quant: bool = False,
    kernels: str = "auto",
) -> nn.Module:
    """Pack linear layers and fused experts as `NF4Linear` does: NormalFloat4, 0.53 bytes a weight.

    Args:
        model: changed in place.
        skip: layers and experts to leave, by a part of their path (`lm_head`, `experts`) or its end
            (`mlp.gate`).
        include: layers outside the language model of a multimodal model, and routers of experts, to
            quantize too, likewise (`vision_tower`, `router`).
        block_size: weights that share a scale.
        double_quant: scales of 8 bits, 0.52 bytes a weight.
        kernels: "torch", "bitsandbytes", or "auto": bitsandbytes' where it is installed, on CUDA,
            and on CPUs where it gives the same values (in a sixth to a ninth of the time).

    Raises:
        ValueError: the model has no linear layer outside `skip`.
    """
    made = [
        partial(kind, block_size=block_size, double_quant=double_quant, kernels=kernels)
        for kind in (NF4Linear, NF4Experts)
    ]
    quantized = _replace(model, skip, include, *made)
    dtype = next(m.dtype for m in quantized.modules() if isinstance(m, NF4Linear))
    if not double_quant and dtype != torch.bfloat16:
        log.info(
            "the scales of NF4's blocks are bfloat16: those of %s weights are rounded, by 0.15 %% "
            "on average; with model.dtype=bfloat16 they are exact",
            dtype_name(dtype),
        )
    return quantized


def int8(
    model: nn.Module, /, *, skip: Sequence[str] = ("lm_head",), include: Sequence[str] = ()
) -> nn.Module:
    """Pack linear layers and fused experts as `Int8Linear` does: 8-bit integers, one scale a row.

    Args:
        model: changed in place.
        skip: as for `nf4`.
        include: as for `nf4`.

    Raises:
        ValueError: the model has no linear layer outside `skip`.
    """
    return _replace(model, skip, include, Int8Linear, Int8Experts)


def bitsandbytes_nf4(
    model: nn.Module,
    /,
    *,
    skip: Sequence[str] = ("lm_head",),
    include: Sequence[str] = (),
    double_quant: bool = True,
) -> nn.Module:
    """Replace linear layers by bitsandbytes' `Linear4bit` (extra `[bnb]`); they cannot be sharded.

    Args:
        model: changed in place.
        skip: as for `nf4`.
        include: as for `nf4`.
        double_quant: bitsandbytes' `compress_statistics`.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model has no linear layer outside `skip`.
    """
    require_bitsandbytes()
    from ditty_di.quantization.bnb_linear import Linear4bit

    return _replace(model, skip, include, partial(Linear4bit, double_quant=double_quant))


def bitsandbytes_int8(
    model: nn.Module,
    /,
    *,
    skip: Sequence[str] = ("lm_head",),
    include: Sequence[str] = (),
    threshold: float = 6.0,
) -> nn.Module:
    """Replace linear layers by bitsandbytes' `Linear8bitLt` (extra `[bnb]`), not to be sharded.

    Args:
        model: changed in place.
        skip: as for `nf4`.
        include: as for `nf4`.
        threshold: inputs beyond it are multiplied in 16 bits (https://arxiv.org/abs/2208.07339).

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model has no linear layer outside `skip`.
    """
    require_bitsandbytes()
    from ditty_di.quantization.bnb_linear import Linear8bit

    return _replace(model, skip, include, partial(Linear8bit, threshold=threshold))


def _replace(
    model: nn.Module,
    skip: Sequence[str],
    include: Sequence[str],
    make: Callable[..., Any],
    make_experts: Callable[..., Any] | None = None,
) -> nn.Module:
    """Replace each linear layer, and each fused weight of experts, quantized if it has values.

    Args:
        model: changed in place.
        skip: what to leave.
        include: what to replace of towers beside a language model, and of routers.
        make: returns the layer for one of `torch.nn.Linear`.
        make_experts: returns the module for a fused weight; None leaves these.
    """
    is_inside, choosing = language_model_paths(model), router_layers(model)

    def is_chosen(path: str) -> bool:
        within = (is_inside(path) and path not in choosing) or _named(path, include)
        return within and not _named(path, skip) and not head_of(model, f"{path}.weight")

    linear_layers = [
        (path, module)
        for path, module in model.named_modules()
        if is_linear(module) and is_chosen(path)
    ]
    experts = [own for own in fused_weights(model) if make_experts and is_chosen(own[0])]
    if not linear_layers:
        raise ValueError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear to quantize outside "
            f"skip={list(skip)}"
        )
    taken = [linear.weight for _, linear in linear_layers]
    rest, fused = left_out(model, [*taken, *(getattr(owner, n) for _, owner, n in experts)])
    text = f" and {len(experts)} weights of fused experts" if experts else ""
    text += f", skipped {list(skip)}"
    paths = [f"{path}." for path, _ in linear_layers]
    left = sum(not any(p.startswith(f"{path}.") for p in paths) for path, _, _ in routers(model))
    others = ", ".join(filter(None, [f"{left} routers" if left else "", rest]))
    text += f"; left out: {others}" if others else ""
    if fused and not make_experts:
        text += f"; {' and '.join(fused)} hold several matrices in one parameter, which "
        text += "quantize=nf4 and quantize=int8 quantize"
    level = logging.WARNING if fused and not make_experts else logging.INFO
    log.log(level, "quantized %d linear layers%s", len(linear_layers), text)
    for path, linear in linear_layers:
        layer = make(
            linear.in_features,
            linear.out_features,
            bias=linear.bias,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        model.set_submodule(path, _filled(layer, linear.weight).train(linear.training))
    for _, owner, name in experts:
        weight = getattr(owner, name)
        assert make_experts is not None
        packed = make_experts(*weight.shape, dtype=weight.dtype, device=weight.device)
        del owner._parameters[name]
        owner.add_module(name, _filled(packed, weight).train(owner.training))
    return model


def _filled(layer: Any, weight: Tensor) -> Any:
    """Return a layer, filled from a weight that has values."""
    if not weight.is_meta:
        own = weight.detach()
        layer.fill_from(lambda name, index: own if index is None else own[index])
    return layer


def _named(path: str, names: Sequence[str]) -> bool:
    return any(name in path.split(".") or f".{path}".endswith(f".{name}") for name in names)
