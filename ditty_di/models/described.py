"""Attach to a module what the trainer has to know of it."""

from __future__ import annotations

from torch import nn

from ditty_di.models.weights import initialize, is_meta
from ditty_di.protocols import WeightsFn


def described(
    module: nn.Module, *, contract: str | None = None, weights: WeightsFn | None = None
) -> nn.Module:
    """Return the module with a contract and default weights as attributes.

    For modules that do not have them in their class, such as those of torch.

    Args:
        module: any module, on meta or with its values.
        contract: its inputs and outputs, such as `0:4:f -> logits:2:f`.
        weights: fills it where the trainer is given no weights; None initializes a module on meta
            by the `reset_parameters()` of its layers.
    """
    if weights is None and is_meta(module):
        weights = initialize
    for name, value in (("contract", contract), ("default_weights", weights)):
        if value is not None:
            object.__setattr__(module, name, value)  # weights may be a module themselves
    return module
