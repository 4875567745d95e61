"""A diffusion transformer (DiT, Peebles & Xie 2023), small enough to read."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditty_di.models.weights import initialize


class DiT(nn.Module):
    """Predict noise, velocity or sample of images, given time and class.

    May be built on the meta device and filled by `ditty_di.models.weights.initialize`: every
    module with parameters has `reset_parameters()`. Blocks start as the identity (adaLN-zero).

    Args:
        size: height and width of the images `[batch, channels, size, size]`.
        channels: of the images.
        patch: side of a token in pixels.
        classes: class labels are 0 .. classes - 1, and `classes` (or any negative label) is no
            class; 0 trains without classes.
        hidden: width of the transformer.
        layers: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP, in multiples of `hidden`.
        device: to build it on; `"meta"` leaves the values to the trainer's `weights`.

    Raises:
        ValueError: sizes that do not divide.
    """

    #: Fills the model where the trainer is given no weights.
    default_weights = staticmethod(initialize)

    def __init__(
        self,
        *,
        size: int = 8,
        channels: int = 1,
        patch: int = 2,
        classes: int = 10,
        hidden: int = 128,
        layers: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if size % patch or hidden % heads or (hidden // heads) % 2:
            raise ValueError(
                f"DiT: patch={patch} must divide size={size}, and heads={heads} must divide "
                f"hidden={hidden} into even sizes"
            )
        self.size, self.channels, self.patch, self.classes = size, channels, patch, classes
        pixels, tokens = channels * patch * patch, (size // patch) ** 2
        self.contract = self.contract_for(classes=classes)
        with torch.device(device) if device else nullcontext():
            self.patches = _Linear(pixels, hidden)
            self.positions = _Table(tokens, hidden)
            self.time = _Time(hidden)
            self.labels = _Table(classes + 1, hidden)
            self.blocks = nn.ModuleList(_Block(hidden, heads, mlp_ratio) for _ in range(layers))
            self.modulation = _Zero(hidden, 2 * hidden)
            self.head = _Zero(hidden, pixels)

    @classmethod
    def contract_for(cls, *, classes: int = 10, **others: Any) -> str:
        """Return the contract of `forward` (`ditty_di.contracts.grammar`).

        Args:
            classes: as for the class.
            **others: ignored.
        """
        labels = " class_labels:1:i64" if classes else ""
        return f"0:4:f timestep:1{labels} -> prediction:4:f"

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the prediction, with the shape of `x`.

        Args:
            x: `[batch, channels, size, size]`.
            timestep: `[batch]`, from 0 to about 1000.
            class_labels: int64 `[batch]`; None is no class.
        """
        if class_labels is None:
            class_labels = torch.full_like(timestep, self.classes, dtype=torch.int64)
        class_labels = torch.where(class_labels < 0, self.classes, class_labels)
        condition = F.silu(self.time(timestep) + self.labels(class_labels))  # [batch, hidden]
        # [batch, tokens, hidden]
        tokens = self.patches(_patches(x, self.patch)) + self.positions.weight
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return _image(self.head(_normed(tokens, shift, scale)), self.patch)


class _Block(nn.Module):
    """Attention and MLP, shifted, scaled and gated by the condition."""

    def __init__(self, hidden: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _Linear(hidden, 3 * hidden)
        self.out = _Linear(hidden, hidden)
        self.up = _Linear(hidden, int(hidden * mlp_ratio))
        self.down = _Linear(int(hidden * mlp_ratio), hidden)
        self.modulation = _Zero(hidden, 6 * hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        # x [batch, tokens, hidden], condition [batch, hidden]
        modulation = self.modulation(condition)[:, None]  # [batch, 1, 6 * hidden]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate * self._attention(_normed(x, shift, scale))
        hidden = F.gelu(self.up(_normed(x, shift_mlp, scale_mlp)), approximate="tanh")
        return x + gate_mlp * self.down(hidden)

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        # [3, batch, heads, tokens, head_dim]
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, hidden))


class _Time(nn.Module):
    """Embed the time: sines and cosines, then a small MLP."""

    def __init__(self, hidden: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.up, self.down = _Linear(frequencies, hidden), _Linear(hidden, hidden)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.frequencies // 2
        ranks = torch.arange(half, device=timestep.device, dtype=torch.float32)
        angles = timestep.float()[:, None] * torch.exp(-math.log(10_000) / half * ranks)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(waves)))


class _Linear(nn.Linear):
    """A linear layer with DiT's initialization: Xavier-uniform weights and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class _Zero(nn.Linear):
    """A linear layer initialized to zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class _Table(nn.Embedding):
    """A table of learned vectors."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def _normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _patches(x: Tensor, patch: int) -> Tensor:
    # [batch, channels, size, size] -> [batch, tokens, channels * patch * patch]
    return F.unfold(x, patch, stride=patch).transpose(1, 2)


def _image(tokens: Tensor, patch: int) -> Tensor:
    """Invert `_patches`."""
    size = math.isqrt(tokens.shape[1]) * patch
    return F.fold(tokens.transpose(1, 2), (size, size), patch, stride=patch)
