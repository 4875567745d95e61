"""One vector for each text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditty_di.batch import Context
from ditty_di.processors.base import PostProcessor

#: Names of the modes, and what sentence-transformers calls them.
MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken"}


class Pooling(PostProcessor):
    """Make embeddings `[rows, hidden]` of a model's last hidden states `[rows, seq, hidden]`.

    The tokens of a row are those whose `attention_mask` is 1; without one all are.

    Args:
        mode: `mean` of the tokens, `cls`: the first of them, or `last`: the last, for causal
            models, in which only that one has seen the whole text.

    Raises:
        ValueError: An unknown mode.
    """

    contract = "last_hidden_state:3:f -> embedding:2:f"

    @staticmethod
    def validate(*, mode: str = "mean") -> None:
        """Raise ValueError for an unknown mode."""
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")

    def __init__(self, *, mode: str = "mean") -> None:
        self.validate(mode=mode)
        super().__init__()
        self.mode = mode

    def process(self, output: Any, ctx: Context) -> tuple[Tensor, Context]:
        """Return the embeddings of the model's output."""
        hidden: Tensor = output.last_hidden_state
        mask = ctx["forward_kwargs"].get("attention_mask")
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        if self.mode == "mean":
            weights = (mask / mask.sum(1, keepdim=True))[..., None].to(hidden.dtype)
            return (hidden * weights).sum(1), ctx
        at = mask.argmax(1) if self.mode == "cls" else _last(mask)
        return hidden[torch.arange(len(hidden), device=hidden.device), at], ctx


def _last(mask: Tensor) -> Tensor:
    """Return the position of the last 1 in each row of a mask `[rows, seq]`."""
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)
