"""What a model predicts about x_t = signal * x_0 + noise_scale * noise, and back from it.

The squares of the two scales add up to 1, so that each of x_0, noise and v determines the others.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

#: x_0 and noise.
Parts = tuple[Tensor, Tensor]


class Prediction(Protocol):
    """The target of the model, and its inverse; tensors are `[batch, ...]`, scales broadcast."""

    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, scale: Tensor, /) -> Tensor:
        """Return what the model should predict.

        Args:
            x_0: the sample.
            noise: standard normal.
            signal: scale of the sample in x_t.
            scale: scale of the noise in x_t.
        """

    def split(self, output: Tensor, x_t: Tensor, signal: Tensor, scale: Tensor, /) -> Parts:
        """Return the (x_0, noise) of `x_t` that the model's output implies.

        Args:
            output: of the model.
            x_t: the input of the model.
            signal: scale of the sample in x_t.
            scale: scale of the noise in x_t.
        """


class Epsilon:
    """Predict the noise (Ho et al. 2020)."""

    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, scale: Tensor, /) -> Tensor:
        """Return the noise; see `Prediction`."""
        return noise

    def split(self, output: Tensor, x_t: Tensor, signal: Tensor, scale: Tensor, /) -> Parts:
        """Return (x_0, noise); see `Prediction`."""
        return (x_t - scale * output) / signal, output


class Sample:
    """Predict x_0, the sample itself (diffusers' `sample`)."""

    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, scale: Tensor, /) -> Tensor:
        """Return the sample; see `Prediction`."""
        return x_0

    def split(self, output: Tensor, x_t: Tensor, signal: Tensor, scale: Tensor, /) -> Parts:
        """Return (x_0, noise); see `Prediction`."""
        return output, (x_t - signal * output) / scale


class Velocity:
    """Predict v = signal * noise - scale * x_0 (Salimans & Ho 2022; diffusers' `v_prediction`)."""

    def target(self, x_0: Tensor, noise: Tensor, signal: Tensor, scale: Tensor, /) -> Tensor:
        """Return v; see `Prediction`."""
        return signal * noise - scale * x_0

    def split(self, output: Tensor, x_t: Tensor, signal: Tensor, scale: Tensor, /) -> Parts:
        """Return (x_0, noise); see `Prediction`."""
        return signal * x_t - scale * output, signal * output + scale * x_t
