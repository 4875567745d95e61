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
    block_size: int = 64,
    double_quant: bool = False,
    kernels: str = "auto",
) -> nn.Module:
    """Replace linear layers by `NF4Linear`: NormalFloat4, 0.53 bytes a weight.

    Args:
        model: changed in place.
        skip: layers to leave, by a part of their path (`lm_head`) or its end (`mlp.gate`).
        block_size: weights that share a scale.
        double_quant: scales of 8 bits, 0.52 bytes a weight.
        kernels: "torch", "bitsandbytes", or "auto": bitsandbytes' where it is installed, on CUDA,
            and on CPUs where it gives the same values (in a sixth to a ninth of the time).

    Raises:
        ValueError: the model has no linear layer outside `skip`.
    """
    make = partial(NF4Linear, block_size=block_size, double_quant=double_quant, kernels=kernels)
    quantized = _replace(model, skip, make)
    dtype = next(m.dtype for m in quantized.modules() if isinstance(m, NF4Linear))
    if not double_quant and dtype != torch.bfloat16:
        log.info(
            "the scales of NF4's blocks are bfloat16: those of %s weights are rounded, by 0.15 %% "
            "on average; with model.dtype=bfloat16 they are exact",
            dtype_name(dtype),
        )
    return quantized


def int8(model: nn.Module, /, *, skip: Sequence[str] = ("lm_head",)) -> nn.Module:
    """Replace linear layers by `Int8Linear`: 8-bit integers with one scale a row.

    Args:
        model: changed in place.
        skip: as for `nf4`.

    Raises:
        ValueError: the model has no linear layer outside `skip`.
    """
    return _replace(model, skip, Int8Linear)


def bitsandbytes_nf4(
    model: nn.Module, /, *, skip: Sequence[str] = ("lm_head",), double_quant: bool = True
) -> nn.Module:
    """Replace linear layers by bitsandbytes' `Linear4bit` (extra `[bnb]`); they cannot be sharded.

    Args:
        model: changed in place.
        skip: as for `nf4`.
        double_quant: bitsandbytes' `compress_statistics`.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model has no linear layer outside `skip`.
    """
    require_bitsandbytes()
    from ditty_di.quantization.bnb_linear import Linear4bit

    return _replace(model, skip, partial(Linear4bit, double_quant=double_quant))


def bitsandbytes_int8(
    model: nn.Module, /, *, skip: Sequence[str] = ("lm_head",), threshold: float = 6.0
) -> nn.Module:
    """Replace linear layers by bitsandbytes' `Linear8bitLt` (extra `[bnb]`), not to be sharded.

    Args:
        model: changed in place.
        skip: as for `nf4`.
        threshold: inputs beyond it are multiplied in 16 bits (https://arxiv.org/abs/2208.07339).

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model has no linear layer outside `skip`.
    """
    require_bitsandbytes()
    from ditty_di.quantization.bnb_linear import Linear8bit

    return _replace(model, skip, partial(Linear8bit, threshold=threshold))


def _replace(model: nn.Module, skip: Sequence[str], make: Callable[..., Any]) -> nn.Module:
    """Replace each linear layer by what `make` returns, quantized if the layer has values."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        if not head_of(model, f"{path}.weight")
        if not any(part in path.split(".") or f".{path}".endswith(f".{part}") for part in skip)
    ]
    if not found:
        raise ValueError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear to quantize outside "
            f"skip={list(skip)}"
        )
    rest, fused = left_out(model, [linear.weight for _, linear in found])
    text = f"; left out: {rest}" if rest else ""
    if fused:
        text += f"; {' and '.join(fused)} hold several matrices in one parameter, which is not "
        text += "quantized"
    level = logging.WARNING if fused else logging.INFO
    log.log(level, "quantized %d linear layers, skipped %s%s", len(found), list(skip), text)
    for path, linear in found:
        layer = make(
            linear.in_features,
            linear.out_features,
            bias=linear.bias,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        if not linear.weight.is_meta:
            layer.fill_from(partial(_part, linear.weight.detach()))
        layer.train(linear.training)
        model.set_submodule(path, layer)
    return model


def _part(weight: Tensor, name: str, index: Any) -> Tensor:
    return weight if index is None else weight[index]
