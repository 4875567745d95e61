"""Losses weighted by a learned uncertainty of each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di import protocols
from ditty_di.batch import Batch
from ditty_di.contracts.grammar import Contract
from ditty_di.losses.composite import CompositeLoss, part_metrics, share


class UncertaintyWeightedLoss(CompositeLoss):
    """The negative log likelihood of several tasks, each with a learned noise.

    With `s_i = log(sigma_i^2)`, the parameters `log_variances`, and the losses `L_i`,

        L = sum_i  w_i * exp(-s_i) * L_i  +  s_i / 2

    Kendall, Gal, Cipolla (2018), Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
    Geometry and Semantics, equations 7 and 10: `w_i` is 1/2 for a squared error (a Gaussian) and 1
    for a cross-entropy (a softmax of temperature `sigma_i^2`). The sum may become negative.

    Args:
        losses: pairs of a loss and its `w_i`; a loss of weight 0 is left out.
        log_variance: initial value of every `s_i`.
        name: prefix of its metrics, as in `CompositeLoss`.
        contract: what it reads, as in `CompositeLoss`.

    Metrics: as in `CompositeLoss`, and `{part}/log_variance`.
    """

    #: The weights of its parts are parameters, which no other stage has.
    of_stage: Any = None

    def __init__(
        self,
        losses: Sequence[tuple[protocols.Loss, float]],
        *,
        log_variance: float = 0.0,
        name: str | None = None,
        contract: str | Contract | None = None,
    ) -> None:
        super().__init__(losses, name=name, contract=contract)
        #: `[parts]`, in float32.
        self.log_variances = nn.Parameter(torch.full((len(self.parts),), float(log_variance)))

    def forward(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's part of L, shape `[]`.

        Each `s_i / 2` is divided among the micro-batches like the count of its part.
        """
        total: Any = 0.0
        metrics: dict[str, Tensor] = {}
        for n, (name, part, count) in enumerate(self.counted(num_valid_global)):
            loss, own = part(output, batch, count)
            log_variance = self.log_variances[n]
            here = share(part, batch, count)
            weight = self.weights[name]
            total = total + weight * torch.exp(-log_variance) * loss + log_variance / 2 * here
            metrics |= part_metrics(name, loss, {**own, "log_variance": log_variance * here})
        return total, {**metrics, "total": total.detach()}
