"""What a model predicts about x_t = signal * x_0 + noise_scale * noise, and back from it.

The scales' squares add up to 1, so that each of x_0, noise and v gives the other two.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Prediction(Protocol):
    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, noise_scale: Tensor, /) -> Tensor:
        """What the model should say; all of one shape but the scales, which multiply it."""
        ...

    def split(
        self, output: Tensor, x_t: Tensor, signal: Tensor, noise_scale: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """(x_0, noise) of which `x_t` consists according to the model's output."""
        ...


class Epsilon:
    """The noise (Ho et al. 2020)."""

    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, noise_scale: Tensor, /) -> Tensor:
        return noise

    def split(
        self, output: Tensor, x_t: Tensor, signal: Tensor, noise_scale: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        return (x_t - noise_scale * output) / signal, output


class Sample:
    """x_0, the sample itself (diffusers' `sample`)."""

    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, noise_scale: Tensor, /) -> Tensor:
        return x_0

    def split(
        self, output: Tensor, x_t: Tensor, signal: Tensor, noise_scale: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        return output, (x_t - signal * output) / noise_scale


class Velocity:
    """v = signal * noise - noise_scale * x_0 (Salimans & Ho 2022; diffusers' `v_prediction`)."""

    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, noise_scale: Tensor, /) -> Tensor:
        return signal * noise - noise_scale * x_0

    def split(
        self, output: Tensor, x_t: Tensor, signal: Tensor, noise_scale: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        return signal * x_t - noise_scale * output, signal * output + noise_scale * x_t
