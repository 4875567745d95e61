"""A picture of a trained model's samples, and their metrics."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditty_di.callbacks import EMA
from ditty_di.diffusion.samplers import Sampler, generate
from ditty_di.export.gather import only_part
from ditty_di.io import is_first_rank, replacing
from ditty_di.models.evaluation import evaluating


@dataclass(eq=False, repr=False)
class SampleGrid:
    """Sample every class after training; an `export` of `ditty_di.tasks.train.train`.

    Every rank samples all rows, because a sharded model needs all ranks in each forward pass; rank
    0 measures and writes.

    Args:
        path: of the PNG, which has a row of pictures for each class.
        sampler: `DDIM` or `Euler`, as the training requires.
        shape: of one sample, `[channels, height, width]` with 1 or 3 channels, from -1 to 1.
        classes: labels 0 .. classes - 1, equally often.
        samples: how many in all.
        columns: how many of each class the picture shows.
        guidance: see `generate`.
        no_class: see `generate`.
        seed: see `generate`.
        batch_size: see `generate`.
        ema: sample with its averages instead of the last weights.
        judge: `judge(samples, labels)` returns metrics.
        enlarge: side of one pixel in the picture.

    Raises:
        ValueError: `samples` does not divide by `classes`.
    """

    path: str
    sampler: Sampler
    _: KW_ONLY
    shape: tuple[int, int, int]
    classes: int
    samples: int = 500
    columns: int = 10
    guidance: float = 1.0
    no_class: int = -1
    seed: int = 0
    batch_size: int | None = 500
    ema: EMA | None = None
    judge: Callable[[Tensor, Tensor], dict[str, float]] | None = None
    enlarge: int = 4

    def __post_init__(self) -> None:
        if self.samples < 1 or self.samples % self.classes:
            raise ValueError(f"samples={self.samples} must be a multiple of classes={self.classes}")

    def __call__(self, model_parts: list[nn.Module]) -> dict[str, float]:
        """Write the picture; return the metrics, `{}` on ranks other than 0.

        Args:
            model_parts: the model alone.

        Raises:
            ValueError: the model is split into pipeline stages.
        """
        model = only_part(model_parts)
        device = next(model.parameters()).device
        labels = torch.arange(self.samples, device=device) % self.classes
        with evaluating([model]), self.ema.swap() if self.ema else nullcontext():
            images = generate(  # [samples, *shape]
                model,
                self.sampler,
                labels,
                shape=tuple(self.shape),
                guidance=self.guidance,
                no_class=self.no_class,
                seed=self.seed,
                batch_size=self.batch_size,
            )
            images = images.float().clamp(-1, 1)
        if not is_first_rank():
            return {}
        # [classes, columns, *shape]
        shown = images.cpu().unflatten(0, (-1, self.classes))[: self.columns].transpose(0, 1)
        write_png(Path(self.path), tiled(shown.flatten(0, 1), shown.shape[1], self.enlarge))
        measured = self.judge(images, labels) if self.judge else {}
        print(f"samples: {self.path}", *(f"{name} {v:.3f}" for name, v in measured.items()))
        return measured


def tiled(images: Tensor, columns: int, enlarge: int = 1, gap: int = 1) -> Tensor:
    """Return images in rows of `columns` as one picture, uint8 `[height, width, channels]`.

    Args:
        images: `[n, channels, height, width]` from -1 to 1.
        columns: images in a row.
        enlarge: side of one pixel.
        gap: black pixels (before enlarging) around each image.
    """
    rows = -(-len(images) // columns)
    tiles = F.pad((images.cpu().float().clamp(-1, 1) + 1) / 2, (gap, 0, gap, 0))
    tiles = torch.cat([tiles, tiles.new_zeros(rows * columns - len(tiles), *tiles.shape[1:])])
    # [rows, columns, c, h, w] -> [c, rows, h, columns, w] -> [c, rows * h, columns * w]
    sheet = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    sheet = F.pad(sheet, (0, gap, 0, gap))
    sheet = sheet.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    return (sheet * 255).round().to(torch.uint8).permute(1, 2, 0)


def write_png(path: Path, pixels: Tensor) -> None:
    """Write a gray or RGB picture as PNG (ISO 15948).

    Args:
        path: of the file.
        pixels: uint8 `[height, width, 1 or 3]`.

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
    rows = F.pad(pixels.cpu().flatten(1), (1, 0))  # a leading 0 says that a row is not filtered
    data = zlib.compress(rows.numpy().tobytes(), 9)
    body = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        body += struct.pack(">I", len(content)) + kind + content + crc
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(body)
