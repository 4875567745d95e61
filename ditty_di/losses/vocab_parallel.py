"""Cross-entropy of logits whose vocabulary is split over ranks: no rank has them all.

Only three numbers a token are communicated (Megatron-LM, https://arxiv.org/abs/1909.08053,
section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ditty_di.models.weights import slices


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int, reduction: str = "sum"
) -> Tensor:
    """Return the cross-entropy in float32, equal on all ranks of the vocabulary.

    Args:
        logits: `[tokens, vocab]`, a plain tensor, or a `DTensor` split along the vocabulary.
        labels: `[tokens]`.
        ignore_index: label value of excluded tokens.
        reduction: "sum", shape `[]`, or "none", `[tokens]`.

    Raises:
        ValueError: the logits are split otherwise.
    """
    if not isinstance(logits, DTensor):
        options = {"ignore_index": ignore_index, "reduction": reduction}
        return F.cross_entropy(logits.float(), labels, **options)  # type: ignore[arg-type]
    if logits.placements != (Shard(1),):
        raise ValueError(
            f"loss: logits must be split along the vocabulary, not {logits.placements}"
        )
    group, columns = logits.device_mesh.get_group(), slices(logits)[1]
    arguments = (labels, ignore_index, columns.start, group)
    losses: Any = _VocabParallel.apply(logits.to_local().float(), *arguments)
    return losses.sum() if reduction == "sum" else losses  # type: ignore[no-any-return]


class _VocabParallel(torch.autograd.Function):
    """Cross-entropy of each token; this rank has the logits of the ids from `start` on."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, start: int, group: Any
    ) -> Tensor:
        largest = logits.amax(1)  # [tokens]
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        exp = (logits - largest[:, None]).exp_()  # [tokens, some of vocab]
        valid = labels != ignore_index
        own = valid & (labels >= start) & (labels < start + logits.shape[1])
        column = torch.where(own, labels - start, 0)[:, None]
        of_label = torch.where(own, logits.gather(1, column)[:, 0] - largest, 0.0)
        sums = torch.stack((exp.sum(1), of_label))
        dist.all_reduce(sums, group=group)
        total, of_label = sums.unbind()
        ctx.save_for_backward(exp.div_(total[:, None]), column, own, valid)
        return torch.where(valid, total.log() - of_label, 0.0)  # [tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        probabilities, column, own, valid = ctx.saved_tensors
        logits = probabilities * (valid * gradient)[:, None]
        logits.scatter_add_(1, column, -(own * gradient)[:, None])
        return logits, None, None, None, None
