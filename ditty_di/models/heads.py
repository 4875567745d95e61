"""Several heads on one body."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ditty_di.models.weights import initialize


class Heads(nn.Module):
    """Apply several heads to the output of one body, and return a tuple of their outputs.

    Args:
        body: called with the input.
        heads: each called with the body's output.
        contract: inputs and outputs (`ditty_di.contracts.grammar`); None leaves them unchecked.
    """

    default_weights = staticmethod(initialize)

    def __init__(
        self, body: nn.Module, heads: Sequence[nn.Module], *, contract: str | None = None
    ) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(heads)
        self.contract = contract

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each head for the input `x`."""
        features = self.body(x)
        return tuple(head(features) for head in self.heads)
