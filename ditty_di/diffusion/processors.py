"""Diffusion as preprocessors: they make the noisy input, its time, and the target of the loss.

Neither the model nor the loss knows of it: `[ClassLabels(), DDPM(...)]` before any model with
`forward(x_t, timestep=..., class_labels=...)`, and an element-wise `MSELoss` behind it.

Random numbers belong to rows (`ditty_di.diffusion.draws`): on any layout and after a resumption
they are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditty_di.diffusion.draws import Draws
from ditty_di.processors.base import PreProcessor

if TYPE_CHECKING:
    from ditty_di.diffusion.predictions import Prediction
    from ditty_di.diffusion.schedules import NoiseSchedule
    from ditty_di.processors.context import Context

#: What flow matching's times from 0 to 1 are for a model, on the scale of a schedule's steps.
TIME_SCALE = 1000.0


class ClassLabels(PreProcessor):
    """Conditions the model on the labels, and drops some of them while training.

    Takes the labels from `target`, int64 `[batch]`, and passes them on as `class_labels`. Rows
    that only fill up the last batch (`ignore_index`) get no class, and `mask` (bool
    `[batch, 1, ...]`, as many dimensions as the batch) is False for them. What is dropped trains
    the unconditional model that classifier-free guidance needs (Ho & Salimans 2022); nothing is
    dropped in evaluation mode.

    Args:
        dropout: share of the rows that lose their class.
        no_class: the label that stands for none.
        ignore_index: as in the loader.
        seed: of the dropping.

    Raises:
        ValueError: `dropout` is not from 0 to 1.
    """

    contract = (
        "0:n | ctx.target:1:i64, ctx.step:0:i64, ctx.model:*, ctx.original_batch:* "
        "-> | ctx.forward_kwargs.class_labels:1:i64, ctx.mask:n:b"
    )

    def __init__(
        self,
        dropout: float = 0.1,
        *,
        no_class: int = -1,
        ignore_index: int = -100,
        seed: int = 0,
        contract: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(contract=contract, name=name)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{self.name}: dropout={dropout} must be from 0 to 1")
        self.dropout, self.no_class, self.ignore_index = dropout, no_class, ignore_index
        self.draws = Draws(seed, "class labels")

    def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        labels = ctx["target"]
        kept = labels != self.ignore_index
        ctx["mask"] = kept.reshape(-1, *[1] * (batch.ndim - 1))
        if self.dropout and ctx["model"].training:
            uniform, _ = self.draws.of_batch(ctx, batch, uniforms=1)
            kept = kept & (uniform[:, 0] >= self.dropout)
        ctx["forward_kwargs"]["class_labels"] = torch.where(kept, labels, self.no_class)
        return batch, ctx


class DDPM(PreProcessor):
    """Adds noise of a random time to the batch (Ho et al. 2020, algorithm 1).

    The batch `[batch, ...]` becomes x_t, the model gets the time as `timestep` int64 `[batch]`,
    and `target` is what the model is to predict, like the batch.

    Args:
        schedule: the noise of each time.
        prediction: epsilon, v or x_0 (`ditty_di.diffusion.predictions`).
        seed: of times and noise.
    """

    contract = (
        "0:n:f | ctx.step:0:i64, ctx.model:*, ctx.original_batch:* "
        "-> x_t:n:f | ctx.forward_kwargs.timestep:1:i64, ctx.target:n:f"
    )

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        seed: int = 0,
        contract: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(contract=contract, name=name)
        self.schedule, self.prediction = schedule, prediction
        self.draws = Draws(seed, "diffusion")

    def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        uniform, noise = self.draws.of_batch(ctx, batch, uniforms=1, normal=True)
        t = (uniform[:, 0] * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)
        signal, noise_scale = self.schedule.scales(t, batch)
        ctx["forward_kwargs"]["timestep"] = t
        ctx["target"] = self.prediction.target(batch, noise, signal, noise_scale)
        return signal * batch + noise_scale * noise, ctx


def uniform(u: Tensor) -> Tensor:
    """Times from 0 to 1, all equally often."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Uniform numbers `u` as times whose logit is normal: more from the middle (Esser et al. 2024,
    section 3.1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


class FlowMatching(PreProcessor):
    """Mixes the batch with noise along a straight line (rectified flow, Liu et al. 2022).

    x_t = (1 - t) x_0 + t noise for a time t in [0, 1], and the model is to predict the velocity
    dx/dt = noise - x_0. It gets `timestep` = t * `time_scale`, float32 `[batch]`.

    Args:
        times: makes times of uniform random numbers, `uniform` or a partial of `logit_normal`.
        time_scale: the model's last time.
        seed: of times and noise.
    """

    contract = (
        "0:n:f | ctx.step:0:i64, ctx.model:*, ctx.original_batch:* "
        "-> x_t:n:f | ctx.forward_kwargs.timestep:1:f32, ctx.target:n:f"
    )

    def __init__(
        self,
        times: Callable[[Tensor], Tensor] = uniform,
        *,
        time_scale: float = TIME_SCALE,
        seed: int = 0,
        contract: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(contract=contract, name=name)
        self.times, self.time_scale = times, time_scale
        self.draws = Draws(seed, "diffusion")

    def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        numbers, noise = self.draws.of_batch(ctx, batch, uniforms=1, normal=True)
        t = self.times(numbers[:, 0])
        ctx["forward_kwargs"]["timestep"] = t * self.time_scale
        ctx["target"] = noise - batch
        t = t.reshape(-1, *[1] * (batch.ndim - 1)).to(batch.dtype)
        return (1 - t) * batch + t * noise, ctx
