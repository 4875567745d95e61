"""From noise to samples with a trained model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ditty_di.diffusion.draws import Draws
from ditty_di.diffusion.predictions import Prediction
from ditty_di.diffusion.processors import TIME_SCALE
from ditty_di.diffusion.schedules import NoiseSchedule

#: `predict(x_t, timestep)`, both with the same rows, returns the model's prediction.
Predict = Callable[[Tensor, Tensor], Tensor]
#: `noise(i)` returns fresh noise for step `i`.
Noise = Callable[[int], Tensor]


class Sampler(Protocol):
    """Turn noise into samples."""

    def __call__(self, predict: Predict, x: Tensor, noise: Noise, /) -> Tensor:
        """Return samples with the shape of `x`.

        Args:
            predict: the model.
            x: standard normal noise `[batch, ...]`.
            noise: for samplers that add some in each step.
        """


class DDIM:
    """Sample by DDIM (Song et al. 2021, arXiv:2010.02502, equation 12).

    Times are spaced evenly from the schedule's last ("trailing", Lin et al. 2024), so that it
    starts from pure noise.

    Args:
        schedule: as in training (`DDPM`).
        prediction: as in training.
        steps: evaluations of the model.
        eta: 0 is deterministic, 1 adds as much noise as ancestral sampling (DDPM).
        clip: clamp each estimate of x_0 to -clip .. clip; None does not.

    Raises:
        ValueError: more steps than the schedule has, or a negative `eta`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        steps: int = 50,
        eta: float = 0.0,
        clip: float | None = None,
    ) -> None:
        if not 1 <= steps <= len(schedule):
            raise ValueError(
                f"DDIM: max_steps={steps} must be from 1 to {len(schedule)}, the schedule"
            )
        if eta < 0:
            raise ValueError(f"DDIM: eta={eta} must not be negative")
        self.schedule, self.prediction = schedule, prediction
        self.steps, self.eta, self.clip = steps, eta, clip

    def times(self) -> list[int]:
        """Return the times from the last one to -1, which is before the first."""
        total = len(self.schedule)
        return [round(total * (1 - i / self.steps)) - 1 for i in range(self.steps + 1)]

    def __call__(self, predict: Predict, x: Tensor, noise: Noise, /) -> Tensor:
        """Return samples; see `Sampler`."""
        for i, (now, then) in enumerate(pairwise(self.times())):
            t = torch.full((len(x),), now, device=x.device)  # [batch]
            signal, scale = self.schedule.scales(t, x)  # [batch, 1, ...]
            signal_then, scale_then = self.schedule.scales(torch.full_like(t, then), x)
            x_0, epsilon = self.prediction.split(predict(x, t), x, signal, scale)
            if self.clip is not None:
                x_0 = x_0.clamp(-self.clip, self.clip)
                epsilon = (x - signal * x_0) / scale
            added = torch.zeros_like(scale)
            if self.eta:
                ratio = (signal / signal_then).square()
                added = self.eta * scale_then / scale * (1 - ratio).clamp(min=0).sqrt()
            kept = (scale_then.square() - added.square()).clamp(min=0).sqrt()
            x = signal_then * x_0 + kept * epsilon
            if self.eta and then >= 0:
                x = x + added * noise(i)
        return x


class Euler:
    """Follow a velocity from time 1 to 0 in equal steps, for a model trained by `FlowMatching`.

    Args:
        steps: evaluations of the model.
        time_scale: as in training.

    Raises:
        ValueError: less than one step.
    """

    def __init__(self, *, steps: int = 50, time_scale: float = TIME_SCALE) -> None:
        if steps < 1:
            raise ValueError(f"Euler: max_steps={steps} must be at least 1")
        self.steps, self.time_scale = steps, time_scale

    def __call__(self, predict: Predict, x: Tensor, noise: Noise, /) -> Tensor:
        """Return samples; see `Sampler`."""
        for i in range(self.steps):
            time = (1 - i / self.steps) * self.time_scale
            t = torch.full((len(x),), time, device=x.device, dtype=torch.float32)  # [batch]
            x = x - predict(x, t) / self.steps
        return x


def guided(
    model: Callable[..., Any], class_labels: Tensor, *, guidance: float = 1.0, no_class: int = -1
) -> Predict:
    """Return the model under classifier-free guidance (Ho & Salimans 2022).

    It predicts unconditional + guidance * (conditional - unconditional). 1 is the conditional model
    alone, 0 the unconditional; other values run both, as one batch of twice the rows.

    Args:
        model: `model(x_t, timestep=[rows], class_labels=[rows])`.
        class_labels: int64 `[rows]`.
        guidance: strength.
        no_class: the label of rows without a class.
    """
    none = torch.full_like(class_labels, no_class)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if guidance in (0.0, 1.0):
            return model(x, timestep=t, class_labels=class_labels if guidance else none)
        labels = torch.cat([class_labels, none])  # [2 * rows]
        both = model(torch.cat([x, x]), timestep=torch.cat([t, t]), class_labels=labels)
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return predict


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    sampler: Sampler,
    class_labels: Tensor,
    *,
    shape: tuple[int, ...],
    guidance: float = 1.0,
    no_class: int = -1,
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Return one sample for each label: `[labels, *shape]` on the labels' device.

    Row n depends on the seed, n and its label, but not on `batch_size`, up to rounding.

    Args:
        model: see `guided`.
        sampler: `DDIM` or `Euler`.
        class_labels: int64 `[labels]`.
        shape: of one sample.
        guidance: see `guided`.
        no_class: see `guided`.
        seed: of the noise.
        batch_size: rows at once; None is all.
    """
    draws = Draws(seed, "sampling")
    like = torch.empty(0, dtype=torch.float32, device=class_labels.device)
    samples = [like.new_empty((0, *shape))]
    size = batch_size or max(1, len(class_labels))
    for first in range(0, len(class_labels), size):
        labels = class_labels[first : first + size]
        rows = range(first, first + len(labels))

        def noise(step: int, rows: range = rows) -> Tensor:
            return draws.of_rows(rows, step + 1, normal=tuple(shape), like=like)[1]

        predict = guided(model, labels, guidance=guidance, no_class=no_class)
        samples.append(sampler(predict, noise(-1), noise))
    return torch.cat(samples)
