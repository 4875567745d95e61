"""Which linear layers of a model can multiply in float8."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import nn

from ditty_di.messages import first_of

log = logging.getLogger(__name__)

#: What float8 kernels want both sides of a weight to be a multiple of.
MULTIPLE = 16


def replaceable(model: nn.Module, *, skip: Sequence[str]) -> list[tuple[str, nn.Linear]]:
    """Return (name, module) of the plain linear layers with both sides divisible by 16.

    Plain: `nn.Linear` itself, for a subclass (a quantized layer, another library's) computes in its
    own way. The small layers of an adapter beside a `base_layer` (peft's LoRA) stay as they are.

    Args:
        model: any module.
        skip: whole parts of names, such as `lm_head` or `self_attn.q_proj`.

    Raises:
        ValueError: there is none.
    """
    adapters = {
        id(module)
        for layer in model.modules()
        if "base_layer" in layer._modules
        for name, child in layer.named_children()
        if name != "base_layer"
        for module in child.modules()
    }
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in adapters
    ]
    taken = [(name, m) for name, m in linears if not _named(name, skip) and _divisible(m)]
    left = [name for name, m in linears if (name, m) not in taken]
    if not taken:
        raise ValueError(
            f"precision: none of the model's {len(linears)} plain linear layers can be float8: "
            f"both sides must be multiples of {MULTIPLE}, and skip={list(skip)} leaves some out "
            f"(layers of a quantized base are never converted); use precision=bf16"
        )
    log.info(
        "float8: %d linear layers; in the model's own precision: %s",
        len(taken),
        first_of(left, 5) or "none",
    )
    return taken


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Return the model with the submodule `name` replaced; `module` itself for the root."""
    if not name:
        return module
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._modules[last] = module
    return model


def _named(name: str, parts: Iterable[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def _divisible(linear: nn.Linear) -> bool:
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
