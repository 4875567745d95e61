"""The weight of each time of a diffusion process in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditty_di.batch import Context
from ditty_di.diffusion.predictions import Prediction
from ditty_di.diffusion.schedules import NoiseSchedule
from ditty_di.processors.base import PostProcessor


class MinSNR(PostProcessor):
    """Scale prediction and target by the Min-SNR weight (Hang et al. 2023, arXiv:2303.09556).

    A squared error then has the weight min(snr, gamma) of an error of x_0, with snr =
    (signal / noise_scale)^2: min(snr, gamma) / snr for predicted noise, and
    min(snr, gamma) / (snr + 1) for v (section 3.4). Times with little noise no longer dominate.

    Args:
        schedule: as in `DDPM`, which is among the preprocessors.
        prediction: as in `DDPM`.
        gamma: the largest weight of an error of x_0.
        contract: replaces the class's contract.
        name: of the processor in messages.

    Raises:
        ValueError: `gamma` is not above 0.
    """

    contract = (
        "0:n:f | ctx.target:n:f, ctx.forward_kwargs.timestep:1:i64 "
        "-> prediction:n:f | ctx.target:n:f"
    )

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        gamma: float = 5.0,
        contract: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(contract=contract, name=name)
        if not gamma > 0:
            raise ValueError(f"{self.name}: gamma={gamma} must be above 0, such as 5")
        self.schedule, self.prediction, self.gamma = schedule, prediction, gamma

    def process(self, output: Tensor, ctx: Context) -> tuple[Any, Context]:
        """Return the scaled output; write the scaled `target`; see `PostProcessor`."""
        target = ctx["target"]  # [batch, ...]
        signal, noise_scale = self.schedule.scales(ctx["forward_kwargs"]["timestep"], target)
        # x_0 is linear in the output, so its error is this many times the output's.
        one, zero = torch.ones_like(signal), torch.zeros_like(signal)
        slope = self.prediction.split(one, zero, signal, noise_scale)[0]
        snr = (signal / noise_scale).square()
        scale = snr.clamp(max=self.gamma).sqrt() * slope.abs()  # [batch, 1, ...]
        ctx["target"] = scale * target
        return scale * output, ctx
