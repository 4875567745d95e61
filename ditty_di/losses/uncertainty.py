"""Losses weighed by how uncertain each of them turns out to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.contracts.grammar import Contract
from ditty_di.losses.composite import CompositeLoss, part_metrics, share

if TYPE_CHECKING:
    from ditty_di.protocols import Loss


class UncertaintyWeightedLoss(CompositeLoss):
    """The negative log likelihood of several tasks, each with a noise that is learned.

    With `s_i = log(sigma_i^2)`, the parameters `log_variances`, and the losses `L_i`,

        L = sum_i  w_i * exp(-s_i) * L_i  +  s_i / 2

    Kendall, Gal, Cipolla (2018), Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
    Geometry and Semantics, equations 7 and 10: `w_i` is 1/2 for a squared error (a Gaussian) and 1
    for a cross-entropy (a softmax of temperature `sigma_i^2`). The sum may become negative.

    Args:
        losses: pairs of a loss and its `w_i`; one of 0 is left out.
        log_variance: where every `s_i` starts.
        name, contract: as in `CompositeLoss`.

    Metrics: as in `CompositeLoss`, and `{part}/log_variance`.
    """

    def __init__(
        self,
        losses: Sequence[tuple[Loss, float]],
        *,
        log_variance: float = 0.0,
        name: str | None = None,
        contract: str | Contract | None = None,
    ) -> None:
        super().__init__(losses, name=name, contract=contract)
        start = torch.full((len(self.parts),), float(log_variance))
        #: `[parts]`, in float32.
        self.log_variances = nn.Parameter(start)

    def forward(
        self, output: Any, labels: Any, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of L, shape `[]`.

        Each `s_i / 2` is shared out among a window's batches as their part's count is.
        """
        total: Any = 0.0
        metrics: dict[str, Tensor] = {}
        for n, (called, part, count) in enumerate(self.counted(global_count)):
            loss, own = self.call(part, output, labels, count)
            log_variance = self.log_variances[n]
            here = share(part, labels, count)
            weight = self.weights[called]
            total = total + weight * torch.exp(-log_variance) * loss + log_variance / 2 * here
            metrics |= part_metrics(called, loss, {**own, "log_variance": log_variance * here})
        return total, {**metrics, "total": total.detach()}
