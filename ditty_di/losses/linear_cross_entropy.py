"""Cross-entropy from hidden states, a few tokens at a time: the logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditty_di.batch import Batch
from ditty_di.losses.base import Loss
from ditty_di.losses.deferred import DeferredOutput, Head, defer_head


class LinearCrossEntropyLoss(Loss):
    """Cross-entropy in nats per valid label, of a model with `ditty_di.losses.deferred_head`.

    Logits are computed for `chunk_tokens` tokens at a time, in the forward pass and once more in
    the backward pass: `chunk_tokens * vocab` of them exist at once instead of
    `batch * seq * vocab`, for one more product with the output projection (a third more work
    there). Positions without a valid label cost nothing. A trained projection's gradient is the
    sum of its chunks', in the dtype that it computes in.

    Args:
        chunk_tokens: tokens whose logits exist at once.
        ignore_index: label value excluded from the loss.

    Shapes: hidden states `[batch, seq, hidden]`, labels `[batch, seq]`.

    Raises:
        ValueError: `chunk_tokens` is below 1.
    """

    contract = "logits:*:f | ctx.target:2:i64 -> loss:0:f"

    def __init__(self, *, chunk_tokens: int = 1024, ignore_index: int = -100) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ValueError(f"loss.chunk_tokens={chunk_tokens} must be at least 1")
        self.chunk_tokens, self.ignore_index = chunk_tokens, ignore_index

    prepare_model = staticmethod(defer_head)

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return the number of valid labels, shape `[]`, int64."""
        return (batch.target != self.ignore_index).sum()  # type: ignore[no-any-return]

    def forward(
        self, output: DeferredOutput, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed cross-entropy over `num_valid_global`, shape `[]`, in float32.

        Raises:
            TypeError: the model returns logits.
        """
        hidden, labels, head = labeled(self, output, batch.target, self.ignore_index)
        chunks = zip(hidden.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True)
        total = torch.stack(
            [checkpoint(self._summed, head, h, y, use_reentrant=False) for h, y in chunks]
        ).sum()
        return total / num_valid_global, {}

    def _summed(self, head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).float()  # [chunk_tokens, vocab]
        return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")


def labeled(
    loss_fn: Loss, output: Any, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Head]:
    """Return the tokens that have a valid label, and the gathered head.

    Without any valid label one token is left, so that every rank runs the head, and its gradients
    are 0 and not missing where other ranks have some to reduce.

    Args:
        loss_fn: named in the error.
        output: the model's output.
        labels: `[batch, seq]`.
        ignore_index: label value of excluded tokens.

    Returns:
        Hidden states `[tokens, hidden]`, labels `[tokens]`, and the head.

    Raises:
        TypeError: the model returns logits.
    """
    try:
        hidden, head = output.last_hidden_state, output.head
    except AttributeError:
        raise TypeError(
            f"loss: {type(loss_fn).__name__} works on hidden states and a head, but the model "
            f"returned {type(output).__name__}, which has none; defer the head with "
            f"ditty_di.losses.deferred_head(model) (the trainer does it), or choose "
            f"a loss on logits, such as loss=causal_lm"
        ) from None
    head.gather()
    hidden, labels = hidden.flatten(0, -2), labels.flatten()  # [batch * seq, hidden]
    index = (labels != ignore_index).nonzero()[:, 0]
    if index.numel() == 0:
        index = index.new_zeros(1)
    return hidden.index_select(0, index), labels.index_select(0, index), head
