"""Diffusion as preprocessors: they make the noisy input, its time, and the target of the loss.

They work with any model and loss: `[ClassLabels(), DDPM(...)]` before a model with
`forward(x_t, timestep=..., class_labels=...)`, and an element-wise `MSELoss` after it.

Random numbers belong to rows (`ditty_di.diffusion.draws`): they are the same on any layout and
after a resume.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditty_di.batch import Context
from ditty_di.diffusion.draws import Draws
from ditty_di.diffusion.predictions import Prediction
from ditty_di.diffusion.schedules import NoiseSchedule, per_row
from ditty_di.processors.base import PreProcessor

#: The model's last time under flow matching, on the scale of a schedule's steps.
TIME_SCALE = 1000.0
_READS = "ctx.step:0:i64, ctx.model:*, ctx.original_batch:*"  # by `Draws.of_batch`


class ClassLabels(PreProcessor):
    """Condition the model on the labels, and drop some of them while training.

    Reads the labels from `target`, int64 `[batch]`, and writes `class_labels`. Padding rows of the
    last batch (`ignore_index`) get no class, and `mask` (bool `[batch, 1, ...]`, as many dimensions
    as the batch) is False for them. Dropped labels train the unconditional model that
    classifier-free guidance needs (Ho & Salimans 2022); evaluation mode drops none.

    Args:
        dropout: fraction of rows that lose their class, 0 to 1.
        no_class: the label of rows without a class.
        ignore_index: label of padding rows, as in the loader.
        seed: of the dropping.
        contract: replaces the class's contract.
        name: of the processor in messages.

    Raises:
        ValueError: `dropout` is not from 0 to 1.
    """

    contract = (
        f"0:n | ctx.target:1:i64, {_READS} -> | ctx.forward_kwargs.class_labels:1:i64, ctx.mask:n:b"
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
        """Write `class_labels` and `mask`; see `PreProcessor`."""
        labels = ctx["target"]  # [batch]
        kept = labels != self.ignore_index
        ctx["mask"] = per_row(kept, batch)
        if self.dropout and ctx["model"].training:
            uniform, _ = self.draws.of_batch(ctx, batch, uniforms=1)  # [batch, 1]
            kept = kept & (uniform[:, 0] >= self.dropout)
        ctx["forward_kwargs"]["class_labels"] = torch.where(kept, labels, self.no_class)
        return batch, ctx


class DDPM(PreProcessor):
    """Add noise of a random time to the batch (Ho et al. 2020, algorithm 1).

    The batch `[batch, ...]` becomes x_t, the model gets the time as `timestep` int64 `[batch]`,
    and `target` is what the model is to predict, with the shape of the batch.

    Args:
        schedule: the noise of each time.
        prediction: epsilon, v or x_0 (`ditty_di.diffusion.predictions`).
        seed: of times and noise.
        contract: replaces the class's contract.
        name: of the processor in messages.
    """

    contract = f"0:n:f | {_READS} -> x_t:n:f | ctx.forward_kwargs.timestep:1:i64, ctx.target:n:f"

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
        """Return x_t; write `timestep` and `target`; see `PreProcessor`."""
        uniform, noise = self.draws.of_batch(ctx, batch, uniforms=1, normal=True)
        last = len(self.schedule) - 1
        t = (uniform[:, 0] * len(self.schedule)).long().clamp(max=last)  # [batch]
        signal, noise_scale = self.schedule.scales(t, batch)  # [batch, 1, ...]
        ctx["forward_kwargs"]["timestep"] = t
        ctx["target"] = self.prediction.target(batch, noise, signal, noise_scale)
        return signal * batch + noise_scale * noise, ctx


def uniform(u: Tensor) -> Tensor:
    """Return times from 0 to 1, all equally likely.

    Args:
        u: uniform numbers `[batch]`.
    """
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return times whose logit is normal: more from the middle (Esser et al. 2024, section 3.1).

    Args:
        u: uniform numbers `[batch]`.
        mean: of the logit.
        std: of the logit.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


class FlowMatching(PreProcessor):
    """Mix the batch with noise along a straight line (rectified flow, Liu et al. 2022).

    x_t = (1 - t) x_0 + t noise for a time t in [0, 1], and the model is to predict the velocity
    dx/dt = noise - x_0. It gets `timestep` = t * `time_scale`, float32 `[batch]`.

    Args:
        times: makes times of uniform random numbers, `uniform` or a partial of `logit_normal`.
        time_scale: the model's last time.
        seed: of times and noise.
        contract: replaces the class's contract.
        name: of the processor in messages.
    """

    contract = f"0:n:f | {_READS} -> x_t:n:f | ctx.forward_kwargs.timestep:1:f32, ctx.target:n:f"

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
        """Return x_t; write `timestep` and `target`; see `PreProcessor`."""
        uniforms, noise = self.draws.of_batch(ctx, batch, uniforms=1, normal=True)
        t = self.times(uniforms[:, 0])  # [batch]
        ctx["forward_kwargs"]["timestep"] = t * self.time_scale
        ctx["target"] = noise - batch
        t = per_row(t, batch).to(batch.dtype)
        return (1 - t) * batch + t * noise, ctx
