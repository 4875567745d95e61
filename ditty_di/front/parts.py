"""Small parts that examples are made of, and that fit anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ditty_di.losses import CrossEntropyCalculator, LossOutput
from ditty_di.processors import Context, PreProcessor


class Heads(nn.Module):
    """A body with several heads, each of which gets the body's output: a tuple of theirs."""

    def __init__(self, body: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(heads)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.body(x)
        return tuple(head(features) for head in self.heads)


class KeepInput(PreProcessor):
    """Writes the batch into the context: a target for what reconstructs it.

    Args:
        key: of the context.
        flat: as `[batch, features]`.
    """

    def __init__(self, *, key: str = "image", flat: bool = False) -> None:
        super().__init__(contract=self.contract_for(key=key, flat=flat))
        self.key, self.flat = key, flat

    @classmethod
    def contract_for(cls, *, key: str = "image", flat: bool = False) -> str:
        rank = "2" if flat else "n"
        return f"0:n:f -> | ctx.{key}:{rank}:f"

    def process(self, batch: Tensor, ctx: Context) -> tuple[Any, Context]:
        ctx[self.key] = batch.flatten(1) if self.flat else batch
        return batch, ctx


class ClassificationLoss(CrossEntropyCalculator):
    """Cross-entropy, and the `accuracy` of the most probable class, 0 to 1."""

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        computed = super().compute(model_output, ctx)
        labels = self._labels(ctx)
        right = self.get_prediction(model_output, ctx).argmax(-1) == labels
        valid = (labels != self.ignore_index).sum().clamp(min=1)
        return LossOutput(computed.loss, {**computed.metrics, "accuracy": right.sum() / valid})
