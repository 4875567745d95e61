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
    """

    def __init__(self, *, key: str = "image", flat: bool = False) -> None:
        super().__init__()
        self.key, self.flat = key, flat

    @classmethod
    def contract_for(cls, *, key: str = "image", flat: bool = False) -> str:
        return f"0:n:f -> | ctx.{key}:{2 if flat else 'n'}:f"

    def process(self, batch: Tensor, ctx: Context) -> tuple[Any, Context]:
        ctx[self.key] = batch.flatten(1) if self.flat else batch
        return batch, ctx
