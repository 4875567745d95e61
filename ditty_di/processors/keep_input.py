"""A batch as the target of what reconstructs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ditty_di.processors.base import PreProcessor

if TYPE_CHECKING:
    from torch import Tensor

    from ditty_di.processors.context import Context


class KeepInput(PreProcessor):
    """Writes the batch into the context, as it is at this place.

    Args:
        key: of the context.
        flat: as `[batch, features]`.
        mask: where to write which rows count, bool `[batch, 1, ...]` with as many dimensions as
            what is kept: not those that only fill up the last batch, whose labels are all
            `ignore_index`. None writes none, and such rows count as others do.
        ignore_index: as in the loader.
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
        rank = 2 if flat else "n"
        labels, rows = (" | ctx.target:*", f", ctx.{mask}:{rank}:b") if mask else ("", "")
        return f"0:n:f{labels} -> | ctx.{key}:{rank}:f{rows}"

    def process(self, batch: Tensor, ctx: Context) -> tuple[Any, Context]:
        kept = batch.flatten(1) if self.flat else batch
        ctx[self.key] = kept
        if self.mask is not None:
            rows = (ctx["target"] != self.ignore_index).reshape(len(batch), -1).any(1)
            ctx[self.mask] = rows.reshape(-1, *[1] * (kept.dim() - 1))
        return batch, ctx
