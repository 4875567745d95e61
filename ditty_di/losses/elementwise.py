"""Losses that compare a prediction with a target of the same shape, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ditty_di.batch import Context
from ditty_di.losses.calculator import LossCalculator, LossOutput


@dataclass(eq=False, repr=False, kw_only=True)
class ElementwiseLoss(LossCalculator):
    """Base class of means of `elements` over the elements that the mask keeps.

    Prediction and target have the same shape. A mask has as many dimensions, each of the same size
    or 1: with `[batch, seq, 1]` on `[batch, seq, 5]` each position counts five elements. It is 0
    where nothing counts (the target may be NaN there), and may hold weights. Without a mask all
    elements count, also rows with which a loader fills up the last batch:
    `ditty_di.processors.KeepInput` and `ditty_di.diffusion.ClassLabels` write a mask that excludes
    them. Arguments are those of `LossCalculator`.
    """

    contract_template: ClassVar[str | None] = (
        "{output_index}:n:f | ctx.{target_key}:n:f{mask} -> loss:0:f"
    )
    #: Name under which the loss is reported.
    metric: ClassVar[str] = "loss"

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each element, in the shape of both.

        Args:
            prediction: in float32.
            target: in float32, of the same shape.
        """
        raise NotImplementedError

    def count_valid(self, ctx: Context) -> Tensor:
        """Return the number of target elements, or the mask's sum over them, shape `[]`."""
        target, mask = self.get_target(ctx), self.get_mask(ctx)
        if mask is None:
            return torch.tensor(target.numel(), dtype=torch.int64)
        fits = mask.dim() == target.dim() and all(
            m in (1, t) for m, t in zip(mask.shape, target.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{self.name}: ctx.{self.mask_key} has shape {list(mask.shape)}, which cannot mask "
                f"a target of {list(target.shape)}; each dimension has to be the same or 1, as "
                f"mask.unsqueeze(-1) makes a last one"
            )
        # The mask's sum after broadcasting, which repeats each of its elements equally often.
        total = mask.sum(dtype=torch.float64 if mask.is_floating_point() else torch.int64)
        return total * (target.numel() // max(mask.numel(), 1))  # type: ignore[no-any-return]

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """Return the mean over the elements that the mask keeps.

        Raises:
            ValueError: the shapes differ.
        """
        prediction, target = self.get_prediction(model_output, ctx), self.get_target(ctx)
        if prediction.shape != target.shape:
            raise ValueError(
                f"{self.name}: the prediction has shape {list(prediction.shape)} and "
                f"ctx.{self.target_key} {list(target.shape)}; they have to be the same, for "
                f"broadcasting would compare elements that do not belong together"
            )
        prediction, target, mask = prediction.float(), target.float(), self.get_mask(ctx)
        if mask is None:
            loss = self.elements(prediction, target).sum() / max(target.numel(), 1)
        else:
            count = self.count_valid(ctx).to(prediction)
            # Replaced, not multiplied by 0: NaN would stay NaN, also in the gradient.
            target = torch.where(mask != 0, target, prediction.detach())
            total = (self.elements(prediction, target) * mask).sum()
            loss = total / torch.where(count == 0, 1, count)
        return LossOutput(loss, {self.metric: loss})


@dataclass(eq=False, repr=False, kw_only=True)
class MSELoss(ElementwiseLoss):
    """Mean squared error, with the metric `mse`. Arguments are those of `LossCalculator`."""

    metric: ClassVar[str] = "mse"

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the squared error of each element."""
        return F.mse_loss(prediction, target, reduction="none")


@dataclass(eq=False, repr=False, kw_only=True)
class L1Loss(ElementwiseLoss):
    """Mean absolute error, with the metric `l1`. Arguments are those of `LossCalculator`."""

    metric: ClassVar[str] = "l1"

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the absolute error of each element."""
        return F.l1_loss(prediction, target, reduction="none")


@dataclass(eq=False, repr=False, kw_only=True)
class HuberLoss(ElementwiseLoss):
    """Half the squared error up to `delta`, and `delta * (|error| - delta / 2)` beyond it.

    Huber (1964), Robust Estimation of a Location Parameter. The metric is `huber`.

    Args:
        delta: error at which the loss becomes linear; above 0.
        output_index: see `LossCalculator`, as for the other arguments.
        target_key: context key of the target.
        mask_key: context key of the mask.
        name: prefix of its metrics.
        contract: what it reads.
    """

    metric: ClassVar[str] = "huber"

    delta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta <= 0:
            raise ValueError(f"loss.delta={self.delta} must be positive")

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the Huber loss of each element."""
        return F.huber_loss(prediction, target, reduction="none", delta=self.delta)
