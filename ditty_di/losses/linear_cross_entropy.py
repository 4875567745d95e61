"""Cross-entropy from hidden states, a few tokens at a time: the logits never exist as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditty_di.losses.deferred import DeferredOutput, Head, defer_head

if TYPE_CHECKING:
    from ditty_di.protocols import Batch


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy in nats a valid label, of a model with `ditty_di.losses.deferred_head`.

    Logits are computed for `chunk_tokens` tokens at a time, in the forward pass and once more in
    the backward pass: `chunk_tokens * vocab` of them exist at once instead of
    `batch * seq * vocab`, for one more product with the output projection (a third more work
    there). Positions without a valid label cost nothing. A trained projection's gradient is the
    sum of its chunks', in the dtype that it computes in.

    Args:
        chunk_tokens: tokens whose logits exist at once.
        ignore_index: labels with this value weigh nothing.

    Shapes: hidden states `[batch, seq, hidden]`, labels `[batch, seq]`.
    """

    contract = "logits:*:f | ctx.target:2:i64 -> loss:0:f"

    def __init__(self, *, chunk_tokens: int = 1024, ignore_index: int = -100) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ValueError(f"loss.chunk_tokens={chunk_tokens} must be at least 1")
        self.chunk_tokens, self.ignore_index = chunk_tokens, ignore_index

    prepare_model = staticmethod(defer_head)

    def count(self, batch: Batch, /) -> Tensor:
        """Valid labels of the batch, shape `[]`, int64."""
        return (batch[1] != self.ignore_index).sum()

    def forward(
        self, output: DeferredOutput, labels: Tensor, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed cross-entropy over `global_count`, shape `[]`, in float32.

        Raises:
            TypeError: the model returns logits.
        """
        hidden, labels, head = labelled(self, output, labels, self.ignore_index)
        chunks = zip(hidden.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True)
        total = torch.stack(
            [checkpoint(self._summed, head, h, y, use_reentrant=False) for h, y in chunks]
        ).sum()
        return total / global_count, {}

    def _summed(self, head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).float()
        return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")


def labelled(
    loss_fn: nn.Module, output: Any, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Head]:
    """Hidden states `[n, hidden]` that have a valid label, the labels `[n]`, and the gathered head.

    Without any valid label there is still one token, so that every rank runs the head, and its
    gradients are 0 and not missing, where others have some to reduce.

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
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    index = (labels != ignore_index).nonzero()[:, 0]
    if index.numel() == 0:
        index = index.new_zeros(1)
    return hidden.index_select(0, index), labels.index_select(0, index), head
