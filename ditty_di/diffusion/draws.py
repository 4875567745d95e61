"""Random numbers that belong to a row of a step, whichever rank and micro-batch it is in.

All data-parallel ranks have the same global torch seed, so noise from the global generator would be
the same for each rank's rows. Here each row has its own stream, made from (seed, purpose, step,
content of the row). Any layout and any accumulation gives a row the same noise, and a resumed run
draws what it would have drawn, without a state to save.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ditty_di.processors.context import Context


class Draws:
    """Streams for one purpose.

    Args:
        seed: of the run.
        purpose: keeps processors of one seed apart.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self.seed, self.purpose = seed, purpose

    def of_batch(
        self, ctx: Context, batch: Tensor, *, uniforms: int = 0, normal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(`[rows, uniforms]` in [0, 1), standard normals like `batch` or empty) for each row.

        Which row it is, the loader's input tells (`original_batch`): what is equal in it is the
        first, the second, ... of its kind in the micro-batch. Reads `step` and `model` of the
        context as well. In evaluation mode the step does not count: every validation has the same
        noise, so that losses can be compared.
        """
        seen: Counter[int] = Counter()
        keys = []
        for content in fingerprints(ctx["original_batch"][0]["input"]):
            keys.append((content, seen[content]))
            seen[content] += 1
        return self.of_rows(
            keys,
            ctx["step"] if ctx["model"].training else 0,
            uniforms=uniforms,
            normal=tuple(batch.shape[1:]) if normal else None,
            like=batch,
        )

    def of_rows(
        self,
        keys: Iterable[Hashable],
        step: int,
        *,
        uniforms: int = 0,
        normal: tuple[int, ...] | None = None,
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `of_batch`, for rows told apart by `keys`, whose text counts.

        Drawn in float32 on the device of `like`; the normals have its dtype.
        """
        keys = list(keys)
        options: dict[str, Any] = {"dtype": torch.float32, "device": like.device}
        uniform = torch.empty(len(keys), uniforms, **options)
        normals = torch.empty(len(keys), *(normal if normal is not None else (0,)), **options)
        for place, generator in enumerate(self._generators(keys, step, like.device)):
            if uniforms:
                uniform[place].uniform_(generator=generator)
            if normal is not None:
                normals[place].normal_(generator=generator)
        return uniform, normals.to(like.dtype)

    def _generators(
        self, keys: list[Hashable], step: int, device: torch.device
    ) -> Iterator[torch.Generator]:
        generator = torch.Generator(device)
        for key in keys:
            words = f"{self.seed}/{self.purpose}/{step}/{key}".encode()
            digest = hashlib.sha256(words).digest()
            yield generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fingerprints(rows: Tensor) -> list[int]:
    """64 bits for the content of each row, computed where the rows are.

    The sum of each word's hash (the finaliser of splitmix64, Steele et al. 2014) after its place
    was added to it.
    """
    raw = rows.detach().contiguous().reshape(len(rows), -1).view(torch.uint8)
    words = raw.view(torch.int64) if raw.shape[1] % 8 == 0 else raw.long()
    golden, first, second = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
    mixed = words + golden * torch.arange(1, words.shape[1] + 1, device=rows.device)
    for shift, factor in ((30, first), (27, second)):
        # Shifts of signed words repeat the sign; what they are to be is without it.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))).sum(1).tolist()
