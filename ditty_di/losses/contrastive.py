"""Contrastive loss of embeddings: each anchor has to find its positive among those of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard

from ditty_di.batch import Batch
from ditty_di.losses.base import Loss
from ditty_di.parallelize.collectives import moved


class InfoNCELoss(Loss):
    """Cross-entropy of finding the positive of an anchor by similarity, in nats per anchor.

    The loss of an anchor is `-log softmax(similarity / temperature)` at its positive (van den Oord
    et al. 2018, arXiv:1807.03748). Candidates are the positives of all anchors, and the negatives
    if there are any, of one micro-batch over all data-parallel ranks: two ranks with micro-batches
    of n rows give the gradients of one rank with 2 n rows. Gradients flow to the embeddings of all
    ranks. Gradient accumulation does not add candidates: m micro-batches of n rows are m smaller
    problems, another loss than that of one micro-batch of m * n rows.

    Rows of padding, whose label is `ignore_index`, are neither anchors nor candidates. The metric
    `accuracy` is the fraction of anchors whose positive is the most similar candidate.

    Args:
        temperature: The similarities are divided by it.
        cosine: Similarity is the cosine; otherwise the dot product.
        matryoshka_dims: Numbers of leading features; the loss is the mean of the losses of the
            embeddings cut to each of them (Kusupati et al. 2022, arXiv:2205.13147), and the metrics
            are those of the largest. None: all features.
        ignore_index: Label of a row of padding.

    Raises:
        ValueError: A temperature or a number of features that is not positive; (in `forward`) more
            features than the embeddings have.

    Shapes: embeddings `[2 * rows, features]`, anchors first, then their positives, or `[3 * rows,
    features]` with negatives; labels `[rows]`.
    """

    contract = "0:2:f | ctx.target:1:i64 -> loss:0:f"

    @staticmethod
    def validate(
        *, temperature: float = 0.05, matryoshka_dims: Sequence[int] | None = None
    ) -> None:
        """Raise ValueError for a temperature or numbers of features that are not positive."""
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if matryoshka_dims is not None and not (matryoshka_dims and min(matryoshka_dims) > 0):
            raise ValueError(
                f"matryoshka_dims={list(matryoshka_dims)}: write numbers of features of at least "
                f"1, such as [64, 32], or null"
            )

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        cosine: bool = True,
        matryoshka_dims: Sequence[int] | None = None,
        ignore_index: int = -100,
    ) -> None:
        self.validate(temperature=temperature, matryoshka_dims=matryoshka_dims)
        super().__init__()
        self.temperature, self.cosine, self.ignore_index = temperature, cosine, ignore_index
        self.matryoshka_dims = sorted(matryoshka_dims or ())
        self._ranks: DeviceMesh | None = None

    def use_ranks(self, mesh: DeviceMesh) -> None:
        """Take candidates from all data-parallel ranks; called before the first step.

        Args:
            mesh: the data-parallel ranks, of one dimension.
        """
        self._ranks = mesh

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return the number of anchors, shape `[]`."""
        return (batch.target != self.ignore_index).sum()  # type: ignore[no-any-return]

    def forward(
        self, output: Tensor, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over this rank's anchors, over `num_valid_global`, in float32."""
        rows, features = len(batch.target), output.shape[-1]
        dims = self.matryoshka_dims or [features]
        if dims[-1] > features:
            raise ValueError(
                f"loss.matryoshka_dims={dims}: the embeddings have {features} features"
            )
        if len(output) not in (2 * rows, 3 * rows):
            raise ValueError(
                f"{len(output)} embeddings for {rows} rows: a loss of pairs needs two or three of "
                f"each row, as ditty_di.data.PairsCollate puts them into a batch"
            )
        anchors, *others = output.float().split(rows)  # each [rows, features]
        valid = batch.target != self.ignore_index  # [rows]
        target = torch.arange(rows, device=valid.device).masked_fill(~valid, self.ignore_index)
        if self._ranks is not None:
            target = torch.where(valid, target + rows * self._ranks.get_local_rank(), target)
        candidates = torch.cat([self._of_all_ranks(part) for part in others])
        is_candidate = self._of_all_ranks(valid).repeat(len(others))
        total = torch.zeros((), device=output.device)
        for size in dims:
            scores = self._similarity(anchors[:, :size], candidates[:, :size])
            scores = scores.masked_fill(~is_candidate, -torch.inf)  # [rows, candidates]
            total = total + F.cross_entropy(
                scores, target, ignore_index=self.ignore_index, reduction="sum"
            )
        right = (scores.detach().argmax(-1) == target).sum()
        loss = total / len(dims) / num_valid_global
        return loss, {"accuracy": right / num_valid_global}

    def _similarity(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        if self.cosine:
            anchors, candidates = F.normalize(anchors, dim=-1), F.normalize(candidates, dim=-1)
        return anchors @ candidates.T / self.temperature

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks in their order; gradients are summed over the ranks."""
        if self._ranks is None:
            return x
        return moved(x, self._ranks, Shard(0), Replicate(), gradient=Partial())

    def extra_repr(self) -> str:
        """Return the arguments."""
        dims: Any = self.matryoshka_dims or None
        return f"temperature={self.temperature:g}, cosine={self.cosine}, matryoshka_dims={dims}"
