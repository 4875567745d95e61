"""Mixed precision by torch's autocast, with norms and residual sums in the parameters' dtype."""

from __future__ import annotations

import torch
from torch import nn

from ditty_di.precision.context import forward_within


def autocast(model: nn.Module, /, *, dtype: str = "bfloat16") -> nn.Module:
    """Run the model's forward pass under `torch.autocast`: products in `dtype`, norms in float32.

    Parameters keep their dtype, also adapters in float32 beside a base in `dtype`.

    Args:
        model: any module with parameters.
        dtype: name of a torch dtype.
    """
    to = getattr(torch, dtype)

    def context(module: nn.Module) -> torch.autocast:
        return torch.autocast(next(module.parameters()).device.type, dtype=to)

    return forward_within(model, context)
