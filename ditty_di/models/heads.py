"""Several heads on one body."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Heads(nn.Module):
    """A body with several heads, each of which gets the body's output: a tuple of theirs."""

    def __init__(self, body: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(heads)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.body(x)
        return tuple(head(features) for head in self.heads)
