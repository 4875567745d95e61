"""Cross-entropy, and how often it is right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ditty_di.losses.calculator import CrossEntropyCalculator, LossOutput

if TYPE_CHECKING:
    from ditty_di.processors import Context


class ClassificationLoss(CrossEntropyCalculator):
    """Cross-entropy, and the `accuracy` of the most probable class, 0 to 1."""

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        computed = super().compute(model_output, ctx)
        labels = self._labels(ctx)
        right = self.get_prediction(model_output, ctx).argmax(-1) == labels
        valid = (labels != self.ignore_index).sum().clamp(min=1)
        return LossOutput(computed.loss, {**computed.metrics, "accuracy": right.sum() / valid})
