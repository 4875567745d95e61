"""Frozen bases of 4 and 8 bits: transforms that replace a model's linear layers by packed ones.

Each takes a model on the meta device, whose values are then quantised while they are read
(`ditty_di.models.pretrained.Pretrained`), or a model with values. The other parameters stay as
they are; an adapter freezes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

# torch is imported by the transforms: configurations name them before anything needs it.
if TYPE_CHECKING:
    from torch import Tensor, nn

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
    """Linear layers in NormalFloat4 (`NF4Linear`), 0.53 bytes a weight.

    Args:
        skip: layers to leave, by a part of their path (`lm_head`) or its end (`mlp.gate`).
        block_size: weights that share a scale.
        double_quant: scales of 8 bits, 0.52 bytes a weight.
        kernels: "torch", "bitsandbytes", or "auto": bitsandbytes' where it is installed, on CUDA,
            and on CPUs where it gives the same values (in a sixth to a ninth of the time).

    Raises:
        ValueError: the model has no linear layer outside `skip`.
    """
    import torch

    from ditty_di.quantization.nf4_linear import NF4Linear

    make = partial(NF4Linear, block_size=block_size, double_quant=double_quant, kernels=kernels)
    quantised = _replace(model, skip, make)
    dtype = next(m.dtype for m in quantised.modules() if isinstance(m, NF4Linear))
    if not double_quant and dtype != torch.bfloat16:
        log.info(
            "the scales of NF4's blocks are bfloat16: those of %s weights are rounded, by 0.15 %% "
            "on average; with model.dtype=bfloat16 they are exact",
            str(dtype).removeprefix("torch."),
        )
    return quantised


def int8(model: nn.Module, /, *, skip: Sequence[str] = ("lm_head",)) -> nn.Module:
    """Linear layers in 8-bit integers with a scale a row (`Int8Linear`).

    Args:
        skip: as for `nf4`.

    Raises:
        ValueError: the model has no linear layer outside `skip`.
    """
    from ditty_di.quantization.int8_linear import Int8Linear

    return _replace(model, skip, Int8Linear)


def bitsandbytes_nf4(
    model: nn.Module,
    /,
    *,
    skip: Sequence[str] = ("lm_head",),
    double_quant: bool = True,
) -> nn.Module:
    """Linear layers as bitsandbytes' `Linear4bit` (extra `[bnb]`), not to be sharded.

    Args:
        skip: as for `nf4`.
        double_quant: bitsandbytes' `compress_statistics`.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model has no linear layer outside `skip`.
    """
    from ditty_di.quantization.optional import require_bitsandbytes

    require_bitsandbytes()
    from ditty_di.quantization.bnb_linear import Linear4bit

    return _replace(model, skip, partial(Linear4bit, double_quant=double_quant))


def bitsandbytes_int8(
    model: nn.Module, /, *, skip: Sequence[str] = ("lm_head",), threshold: float = 6.0
) -> nn.Module:
    """Linear layers as bitsandbytes' `Linear8bitLt` (extra `[bnb]`), not to be sharded.

    Args:
        skip: as for `nf4`.
        threshold: inputs beyond it are multiplied in 16 bits (https://arxiv.org/abs/2208.07339).

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model has no linear layer outside `skip`.
    """
    from ditty_di.quantization.optional import require_bitsandbytes

    require_bitsandbytes()
    from ditty_di.quantization.bnb_linear import Linear8bit

    return _replace(model, skip, partial(Linear8bit, threshold=threshold))


def _replace(model: nn.Module, skip: Sequence[str], make: Callable[..., nn.Module]) -> nn.Module:
    """Replaces each linear layer by what `make` makes for its shape, quantised if it has values."""
    from torch import nn

    from ditty_di.models.coverage import left_out

    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _skipped(path, skip)
    ]
    if not found:
        raise ValueError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear to quantise outside "
            f"skip={list(skip)}"
        )
    rest, fused = left_out(model, [linear.weight for _, linear in found])
    log.log(
        logging.WARNING if fused else logging.INFO,
        "quantised %d linear layers, skipped %s%s%s",
        len(found),
        list(skip),
        f"; left out: {rest}" if rest else "",
        f"; {' and '.join(fused)} hold several matrices in one parameter, which is not quantised"
        if fused
        else "",
    )
    for path, linear in found:
        weight = linear.weight
        layer = make(
            linear.in_features,
            linear.out_features,
            bias=linear.bias,
            dtype=weight.dtype,
            device=weight.device,
        )
        if not weight.is_meta:
            layer.fill_from(partial(_part, weight.detach()))  # type: ignore[operator]
        layer.train(linear.training)
        model.set_submodule(path, layer)
    return model


def _part(weight: Tensor, name: str, index: Any) -> Tensor:
    return weight if index is None else weight[index]


def _skipped(path: str, skip: Sequence[str]) -> bool:
    """Whether a part of the path, or several at its end, are among them."""
    return any(part in path.split(".") or f".{path}".endswith(f".{part}") for part in skip)
