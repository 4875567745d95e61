"""Cross-entropy over tokens or classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ditty_di.batch import Batch, Context
from ditty_di.losses.calculator import LossCalculator, LossOutput
from ditty_di.losses.vocab_parallel import cross_entropy


@dataclass(eq=False, repr=False, kw_only=True)
class CrossEntropyCalculator(LossCalculator):
    """Cross-entropy in nats per valid label, as a part of a composite, with the metric `ce`.

    Args:
        shift: compare position t with label t + 1, for labels that are a copy of the input.
        ignore_index: label value excluded from the loss.
        output_index: see `LossCalculator`, as for the other arguments.
        target_key: context key of the labels.
        mask_key: context key of a mask; labels are excluded where it is 0.
        name: prefix of its metrics.
        contract: what it reads.

    Shapes: logits `[batch, ..., classes]`; labels, and the mask if there is one, `[batch, ...]`.
    """

    contract_template: ClassVar[str | None] = (
        "{output_index}:n+1:f | ctx.{target_key}:n:i64{mask} -> loss:0:f"
    )

    shift: bool = False
    ignore_index: int = -100

    def count_valid(self, ctx: Context) -> Tensor:
        """Return the number of valid labels, shape `[]`, int64."""
        return self._valid(ctx).sum()

    def valid(self, batch: Batch, /) -> Tensor:
        """Return which labels are valid, in the shape of the labels, bool."""
        return self._valid(batch.full_context())

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """Return the mean cross-entropy over the valid labels."""
        losses = self._losses(self.get_prediction(model_output, ctx), self._labels(ctx))
        loss = losses / self.count_valid(ctx).clamp(min=1)
        return LossOutput(loss, {"ce": loss})

    def _labels(self, ctx: Context) -> Tensor:
        """Return the labels `[batch, ...]`, with `ignore_index` where the mask is 0."""
        labels, mask = self.get_target(ctx), self.get_mask(ctx)
        if mask is None:
            return labels  # type: ignore[no-any-return]
        if mask.shape != labels.shape:
            raise ValueError(
                f"{self.name}: ctx.{self.mask_key} has shape {list(mask.shape)}, but the labels "
                f"that it masks have {list(labels.shape)}"
            )
        return labels.masked_fill(mask == 0, self.ignore_index)

    def _valid(self, ctx: Context) -> Tensor:
        valid = self._labels(ctx) != self.ignore_index
        if self.shift:
            valid[:, 0] = False  # nothing predicts the first token
        return valid

    def _losses(self, logits: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
        """Return the cross-entropy in float32: summed, shape `[]`, or that of each label."""
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(
            logits.flatten(0, -2),  # [tokens, classes]
            labels.flatten(),  # [tokens]
            ignore_index=self.ignore_index,
            reduction=reduction,
        )
        if reduction == "sum":
            return losses
        losses = losses.view(labels.shape)
        return F.pad(losses, (1, 0)) if self.shift else losses


class CrossEntropyLoss(CrossEntropyCalculator):
    """Cross-entropy in nats per valid label.

    Args:
        output: the logits in the model's output: an attribute (`logits` for Hugging Face models),
            or a position (0 is also an output that is one tensor); None for an output that is the
            logits.
        shift: compare position t with label t + 1, for labels that are a copy of the input.
        ignore_index: label value excluded from the loss.

    Shapes: logits `[batch, seq, vocab]` or `[batch, classes]`; labels `[batch, seq]` or `[batch]`.
    """

    takes_split_logits = True
    takes_split_sequences = True

    def __init__(
        self, *, output: str | int | None = None, shift: bool = False, ignore_index: int = -100
    ) -> None:
        super().__init__(output_index=output or 0, shift=shift, ignore_index=ignore_index)

    @classmethod
    def contract_for(cls, *, output: str | int | None = None, **arguments: Any) -> str | None:
        """Return the contract of a loss with these arguments."""
        return super().contract_for(**{**arguments, "output_index": output or 0})

    def forward(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed cross-entropy over `num_valid_global`, shape `[]`, in float32."""
        labels = self._labels(batch.full_context())
        return self._losses(self.get_prediction(output), labels) / num_valid_global, {}

    def element_losses(self, output: Any, batch: Batch, /) -> Tensor:
        """Return the cross-entropy of each label, in the shape of the labels, in float32."""
        labels = self._labels(batch.full_context())
        return self._losses(self.get_prediction(output), labels, reduction="none")


@dataclass(eq=False, repr=False, kw_only=True)
class ClassificationLoss(CrossEntropyCalculator):
    """Cross-entropy with the metrics `ce` and `accuracy` of the most probable class, 0 to 1.

    For labels of sequences also `exact_match`: the fraction of labels whose whole row is right.

    Arguments are those of `CrossEntropyCalculator`.
    """

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """Return the mean cross-entropy, and the accuracy over the valid labels."""
        computed = super().compute(model_output, ctx)
        labels = self._labels(ctx)
        right = self.get_prediction(model_output, ctx).argmax(-1) == labels
        valid = labels != self.ignore_index
        number = valid.sum().clamp(min=1)
        metrics = {**computed.metrics, "accuracy": right.sum() / number}
        if labels.dim() > 1:
            whole = (right | ~valid).flatten(1).all(1)  # [rows]
            metrics["exact_match"] = (valid.flatten(1).sum(1) * whole).sum() / number
        return LossOutput(computed.loss, metrics)
