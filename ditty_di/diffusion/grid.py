"""Samples of a trained model as a picture, and what a judge says about them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ditty_di.diffusion.samplers import Sampler, generate
from ditty_di.io import replacing
from ditty_di.metrics.validation import evaluating

if TYPE_CHECKING:
    from ditty_di.callbacks import EMA


class SampleGrid:
    """Samples every class when training has ended; an `export` of `ditty_di.tasks.train.train`.

    Every rank samples all rows, because a sharded model needs all ranks in each forward pass; rank
    0 judges and writes.

    Args:
        path: of the PNG: a row of pictures for each class.
        sampler: `DDIM` or `Euler`, fitting what was trained.
        shape: of one sample, `[channels, height, width]` with 1 or 3 channels, from -1 to 1.
        classes: labels 0 .. classes - 1, equally often.
        samples: how many in all.
        columns: how many of each class the picture shows.
        guidance, no_class, seed, batch_size: see `generate`.
        ema: sample with its averages instead of the last weights.
        judge: `judge(samples, labels)` measures them; its values become metrics.
        enlarge: side of one pixel in the picture.

    Raises:
        ValueError: `samples` does not divide by `classes`.
    """

    def __init__(
        self,
        path: str,
        sampler: Sampler,
        *,
        shape: tuple[int, int, int],
        classes: int,
        samples: int = 500,
        columns: int = 10,
        guidance: float = 1.0,
        no_class: int = -1,
        seed: int = 0,
        batch_size: int | None = 500,
        ema: EMA | None = None,
        judge: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
        enlarge: int = 4,
    ) -> None:
        if samples < 1 or samples % classes:
            raise ValueError(f"samples={samples} must be a multiple of classes={classes}")
        self.path, self.sampler, self.shape = path, sampler, tuple(shape)
        self.classes, self.samples, self.columns = classes, samples, columns
        self.guidance, self.no_class, self.seed = guidance, no_class, seed
        self.batch_size, self.ema, self.judge, self.enlarge = batch_size, ema, judge, enlarge

    def __call__(self, model_parts: list[nn.Module]) -> dict[str, float]:
        """Writes the picture; what the judge measured, `{}` on ranks other than 0.

        Raises:
            ValueError: the model is split into pipeline stages.
        """
        from ditty_di.export.gather import is_first_rank, only_part

        model = only_part(model_parts)
        device = next(model.parameters()).device
        labels = torch.arange(self.samples, device=device) % self.classes
        with evaluating([model]), self.ema.swap() if self.ema else nullcontext():
            images = generate(
                model,
                self.sampler,
                labels,
                shape=self.shape,
                guidance=self.guidance,
                no_class=self.no_class,
                seed=self.seed,
                batch_size=self.batch_size,
            )
            images = images.float().clamp(-1, 1)
        if not is_first_rank():
            return {}
        shown = images.cpu().unflatten(0, (-1, self.classes))[: self.columns].transpose(0, 1)
        write_png(Path(self.path), tiled(shown.flatten(0, 1), shown.shape[1], self.enlarge))
        measured = self.judge(images, labels) if self.judge else {}
        print(f"samples: {self.path}", *(f"{name} {v:.3f}" for name, v in measured.items()))
        return measured


def tiled(images: Tensor, columns: int, enlarge: int = 1, gap: int = 1) -> Tensor:
    """Images `[n, channels, height, width]` from -1 to 1 as one uint8 `[height, width, channels]`.

    They fill rows of `columns`, with `gap` black pixels (before enlarging) around each.
    """
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.zeros(channels, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, image in enumerate((images.cpu().float().clamp(-1, 1) + 1) / 2):
        top, left = i // columns * (height + gap) + gap, i % columns * (width + gap) + gap
        sheet[:, top : top + height, left : left + width] = image
    sheet = sheet.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    return (sheet * 255).round().to(torch.uint8).permute(1, 2, 0)


def write_png(path: Path, pixels: Tensor) -> None:
    """Writes uint8 `[height, width, channels]`, grey (1 channel) or RGB (3): PNG, ISO 15948.

    Raises:
        ValueError: another dtype or number of channels.
    """
    colour_types = {1: 0, 3: 2}
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] not in colour_types:
        raise ValueError(
            f"write_png: pixels must be uint8 [height, width, 1 or 3]; got {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, colour_types[channels], 0, 0, 0)
    # A byte for each row says that it is not filtered.
    data = b"".join(b"\0" + row.contiguous().numpy().tobytes() for row in pixels.cpu())
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
