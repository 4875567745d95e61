"""Keep the batch as the target of a loss that reconstructs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditty_di.batch import Context
from ditty_di.processors.base import PreProcessor


class KeepInput(PreProcessor):
    """Write the batch into the context, as it is at this position among the preprocessors.

    Args:
        key: context key to write.
        flat: write it as `[batch, features]`.
        mask: context key to write which rows count, bool `[batch, 1, ...]` with as many dimensions
            as the kept batch: rows that only pad the last batch have no label other than
            `ignore_index` and do not count. None writes no mask, and such rows count as well.
        ignore_index: label value of rows that do not count, as in the loader.
    """

    def __init__(
        self,
        *,
        key: str = "image",
        flat: bool = False,
        mask: str | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.key, self.flat, self.mask, self.ignore_index = key, flat, mask, ignore_index

    @classmethod
    def contract_for(
        cls, *, key: str = "image", flat: bool = False, mask: str | None = None, **others: Any
    ) -> str:
        """Return the contract of a processor with these arguments."""
        rank = 2 if flat else "n"
        labels, rows = (" | ctx.target:*", f", ctx.{mask}:{rank}:b") if mask else ("", "")
        return f"0:n:f{labels} -> | ctx.{key}:{rank}:f{rows}"

    def process(self, batch: Tensor, ctx: Context) -> tuple[Any, Context]:
        """Write the batch, and the mask if there is one; the batch goes on unchanged."""
        kept = batch.flatten(1) if self.flat else batch
        ctx[self.key] = kept
        if self.mask is not None:
            rows = (ctx["target"] != self.ignore_index).reshape(len(batch), -1).any(1)  # [batch]
            ctx[self.mask] = rows.reshape(-1, *[1] * (kept.dim() - 1))  # [batch, 1, ...]
        return batch, ctx
