"""Linear layers that multiply in float8, by torchao."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import nn

from ditty_di.precision.linears import replaceable
from ditty_di.protocols import early_checks

log = logging.getLogger(__name__)

#: NVIDIA's Ada, and AMD's MI300 with its own numbering above it.
COMPUTE_CAPABILITY = (8, 9)


def _validate(*, recipe: str = "tensorwise") -> None:
    from torchao.float8.config import Float8LinearRecipeName

    if recipe not in (names := [name.value for name in Float8LinearRecipeName]):
        raise ValueError(f"precision: recipe={recipe!r} is none of torchao's {names}")


@early_checks(validate=_validate)
def torchao(
    model: nn.Module,
    /,
    *,
    recipe: str = "tensorwise",
    emulate: bool | None = None,
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Replace plain linear layers by torchao's `Float8Linear`: same names, same parameters.

    Weights stay in their dtype; they, the inputs and the gradients are scaled and rounded to
    float8 for each product (arXiv 2209.05433). The base layers of a LoRA model are converted, its
    adapters not; torchao then also computes the base's gradients, which are not used, so that the
    speedup is smaller than with full fine-tuning. Layers of a quantized base are left alone.

    Args:
        model: any module with linear layers.
        recipe: a name of torchao's `Float8LinearRecipeName`: `tensorwise` (one scale a tensor,
            fastest), `rowwise`, `rowwise_with_gw_hp` (weight gradients unrounded, most exact).
        emulate: round to float8 and multiply in float32, slowly; None does so where there is no
            hardware for it, and logs it.
        skip: parts of the names of layers to leave as they are.

    Raises:
        ValueError: another recipe; no layer to convert.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    _validate(recipe=recipe)
    if emulate is None:
        cuda = torch.cuda.is_available()
        emulate = not (cuda and torch.cuda.get_device_capability() >= COMPUTE_CAPABILITY)
        if emulate:
            log.warning(
                "float8 is emulated: this machine has no accelerator of compute capability %d.%d "
                "or higher, so it trains with float8's rounding but not with its speed",
                *COMPUTE_CAPABILITY,
            )
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        # The weights' gradients sum over tokens, whose number need not be a multiple of 16.
        pad_inner_dim=True,
    )
    chosen = {id(module) for _, module in replaceable(model, skip=skip)}
    return convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: id(module) in chosen
    )
