"""How much noise there is at each time of a diffusion process.

The forward process is x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise for
t = 0 .. steps - 1 (Ho et al. 2020, equation 4). Values equal those of diffusers' schedulers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class NoiseSchedule:
    """A variance schedule.

    Args:
        betas: `[steps]`, each in (0, 1): the variance that each time step adds.

    Raises:
        ValueError: `betas` is not such a list.
    """

    def __init__(self, betas: Tensor) -> None:
        if betas.ndim != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
            span = f" from {betas.min():g} to {betas.max():g}" if betas.numel() else ""
            raise ValueError(
                f"noise schedule: betas must be a list of numbers above 0 and below 1; got shape "
                f"{list(betas.shape)}{span}"
            )
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)

    def __len__(self) -> int:
        """Number of time steps."""
        return len(self.betas)

    def __repr__(self) -> str:
        return f"NoiseSchedule(steps={len(self)}, last={self.alphas_cumprod[-1]:.3g})"

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (signal, noise) scales of each row, whose squares add up to 1.

        Args:
            t: times `[batch]`; -1 is before the first, without noise.
            like: `[batch, ...]`, which the scales broadcast with, and whose dtype they have.
        """
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        kept = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])
        kept = per_row(kept, like)
        return kept.sqrt().to(like.dtype), (1.0 - kept).sqrt().to(like.dtype)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return values `[batch]` as `[batch, 1, ...]`.

    Args:
        values: one per row.
        like: `[batch, ...]`, with the number of dimensions to return.
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


def linear(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
    """Return equally spaced betas (Ho et al. 2020; diffusers' `linear`).

    Args:
        steps: number of time steps.
        start: the first beta.
        end: the last beta.
    """
    return NoiseSchedule(torch.linspace(start, end, steps, dtype=torch.float32))


def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> NoiseSchedule:
    """Return betas with equally spaced square roots (latent diffusion; diffusers' `scaled_linear`).

    Args:
        steps: number of time steps.
        start: the first beta.
        end: the last beta.
    """
    return NoiseSchedule(torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2)


def cosine(steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """Return betas whose alphas_cumprod follow a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    diffusers' `squaredcos_cap_v2`.

    Args:
        steps: number of time steps.
        offset: keeps the first betas from being too small.
        max_beta: keeps the last steps from being singular.
    """

    def kept(time: float) -> float:
        return math.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2

    betas = [min(1 - kept((i + 1) / steps) / kept(i / steps), max_beta) for i in range(steps)]
    return NoiseSchedule(torch.tensor(betas, dtype=torch.float32))
