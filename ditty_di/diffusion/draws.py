"""Random numbers that belong to a row of a step, on any rank and in any micro-batch.

All data-parallel ranks have the same global torch seed, so noise from the global generator would be
the same for each rank's rows. Here each row has its own stream, seeded by (seed, purpose, step,
content of the row). Any layout and any accumulation gives a row the same noise, and a resumed run
draws what it would have drawn, without a state to save.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from ditty_di.batch import Context


class Draws:
    """Streams of random numbers for one purpose.

    Args:
        seed: of the run.
        purpose: separates processors with the same seed.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self.seed, self.purpose = seed, purpose

    def of_batch(
        self, ctx: Context, batch: Tensor, *, uniforms: int = 0, normal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return random numbers for each row of a batch; see `of_rows`.

        Rows are identified by the content of the loader's input (`original_batch`): equal rows are
        numbered within the micro-batch. In evaluation mode the step does not count: every
        validation has the same noise, so that losses can be compared.

        Args:
            ctx: of the batch; `original_batch`, `step` and `model` are read.
            batch: `[batch, ...]`.
            uniforms: how many uniform numbers per row.
            normal: whether to draw normal numbers with the shape of the batch.
        """
        seen: Counter[int] = Counter()
        keys = []
        for content in fingerprints(ctx["original_batch"][0]["input"]):
            keys.append((content, seen[content]))
            seen[content] += 1
        step = ctx["step"] if ctx["model"].training else 0
        shape = tuple(batch.shape[1:]) if normal else None
        return self.of_rows(keys, step, uniforms=uniforms, normal=shape, like=batch)

    def of_rows(
        self,
        keys: Iterable[Hashable],
        step: int,
        *,
        uniforms: int = 0,
        normal: tuple[int, ...] | None = None,
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return uniform numbers in [0, 1) and standard normal numbers for each row.

        They are `[rows, uniforms]` in float32 and `[rows, *normal]` in the dtype of `like`, drawn
        in float32.

        Args:
            keys: identify the rows by their `str`.
            step: of the training.
            uniforms: how many uniform numbers per row.
            normal: shape of a row's normal numbers; None draws none.
            like: gives device and dtype.
        """
        keys = list(keys)
        options: dict[str, Any] = {"dtype": torch.float32, "device": like.device}
        uniform = torch.empty(len(keys), uniforms, **options)
        normals = torch.empty(len(keys), *(normal if normal is not None else (0,)), **options)
        generator = torch.Generator(like.device)
        for row, key in enumerate(keys):
            words = f"{self.seed}/{self.purpose}/{step}/{key}".encode()
            digest = hashlib.sha256(words).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            if uniforms:
                uniform[row].uniform_(generator=generator)
            if normal is not None:
                normals[row].normal_(generator=generator)
        return uniform, normals.to(like.dtype)


def fingerprints(rows: Tensor) -> list[int]:
    """Return a 64-bit hash of the content of each row, computed on its device.

    The sum of each word's hash (the finalizer of splitmix64, Steele et al. 2014) after its position
    was added to it.

    Args:
        rows: `[rows, ...]`.
    """
    raw = rows.detach().contiguous().reshape(len(rows), -1).view(torch.uint8)
    words = raw.view(torch.int64) if raw.shape[1] % 8 == 0 else raw.long()  # [rows, words]
    golden, first, second = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
    mixed = words + golden * torch.arange(1, words.shape[1] + 1, device=rows.device)
    for shift, factor in ((30, first), (27, second)):
        # A shift of signed words repeats the sign; the mask makes it a logical shift.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))).sum(1).tolist()
