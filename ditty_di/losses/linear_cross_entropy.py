"""Cross-entropy from hidden states, a few tokens at a time: the logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditty_di.batch import Batch
from ditty_di.losses.base import Loss
from ditty_di.losses.hidden_states import Head, HiddenStatesOutput, without_lm_head
from ditty_di.losses.vocab_parallel import cross_entropy


class LinearCrossEntropyLoss(Loss):
    """Cross-entropy in nats per valid label, of a model with `ditty_di.losses.skip_lm_head`.

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

    takes_split_sequences = True
    prepare_model = staticmethod(without_lm_head)

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return the number of valid labels, shape `[]`, int64."""
        return self.valid(batch).sum()

    def valid(self, batch: Batch, /) -> Tensor:
        """Return which labels are valid, in the shape of the labels, bool."""
        return batch.target != self.ignore_index  # type: ignore[no-any-return]

    def forward(
        self, output: HiddenStatesOutput, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed cross-entropy over `num_valid_global`, shape `[]`, in float32.

        Raises:
            TypeError: the model returns logits.
        """
        chunks, _ = self._chunks(output, batch, "sum")
        return torch.stack(chunks).sum() / num_valid_global, {}

    def element_losses(self, output: HiddenStatesOutput, batch: Batch, /) -> Tensor:
        """Return the cross-entropy of each label, in the shape of the labels, in float32.

        Raises:
            TypeError: the model returns logits.
        """
        chunks, index = self._chunks(output, batch, "none")
        losses = torch.cat(chunks)
        return (
            losses.new_zeros(batch.target.numel())
            .index_copy(0, index, losses)
            .view_as(batch.target)
        )

    def _chunks(
        self, output: HiddenStatesOutput, batch: Batch, reduction: str
    ) -> tuple[list[Tensor], Tensor]:
        """Return the cross-entropy of each chunk, and the index of the tokens of all chunks."""
        hidden, labels, head, index = labeled(self, output, batch.target, self.ignore_index)

        def losses(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = head(hidden)  # [chunk_tokens, vocab]
            return cross_entropy(
                logits, labels, ignore_index=self.ignore_index, reduction=reduction
            )

        chunks = zip(hidden.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True)
        return [checkpoint(losses, h, y, use_reentrant=False) for h, y in chunks], index


def labeled(
    loss_fn: Loss, output: Any, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Head, Tensor]:
    """Return the tokens that have a valid label, the gathered head, and where the tokens are.

    Without any valid label one token is left, so that every rank runs the head, and its gradients
    are 0 and not missing where other ranks have some to reduce.

    Args:
        loss_fn: named in the error.
        output: the model's output.
        labels: `[batch, seq]`.
        ignore_index: label value of excluded tokens.

    Returns:
        Hidden states `[tokens, hidden]`, labels `[tokens]`, the head, and the index of the tokens
        among all, `[tokens]`.

    Raises:
        TypeError: the model returns logits.
    """
    try:
        hidden, head = output.last_hidden_state, output.head
    except AttributeError:
        raise TypeError(
            f"loss: {type(loss_fn).__name__} works on hidden states and a head, but the model "
            f"returned {type(output).__name__}, which has none; defer the head with "
            f"ditty_di.losses.skip_lm_head(model) (the trainer does it), or choose "
            f"a loss on logits, such as loss=causal_lm"
        ) from None
    head.gather()
    hidden, labels = hidden.flatten(0, -2), labels.flatten()  # [batch * seq, hidden]
    index = (labels != ignore_index).nonzero()[:, 0]
    if index.numel() == 0:
        index = index.new_zeros(1)
    return hidden.index_select(0, index), labels.index_select(0, index), head, index
