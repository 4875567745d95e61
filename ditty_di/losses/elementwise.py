"""Losses that compare a prediction with a target of its shape, element by element."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditty_di.contracts.grammar import Contract
from ditty_di.losses.calculator import LossCalculator, LossOutput
from ditty_di.processors.context import Context


class ElementwiseLoss(LossCalculator):
    """The mean of `elements` over the elements that the mask leaves; `metric` is what it is called.

    Prediction and target have one shape. A mask has as many dimensions, each of the same size or
    1: with `[batch, seq, 1]` on `[batch, seq, 5]` each position counts five elements. It is 0 where
    nothing counts (the target may be NaN there), and may hold weights. Without a mask everything
    counts, also rows with which a loader fills up the last batch: `ditty_di.processors.KeepInput`
    and `ditty_di.diffusion.ClassLabels` write a mask that leaves them out.
    """

    metric = "loss"

    @classmethod
    def contract_for(
        cls,
        *,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        **others: Any,
    ) -> str | None:
        mask = f", ctx.{mask_key}:n" if mask_key else ""
        return f"{output_index}:n:f | ctx.{target_key}:n:f{mask} -> loss:0:f"

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each element, in the shape of both."""
        raise NotImplementedError

    def weight(self, ctx: Context) -> Tensor:
        """Elements of the target, or the mask's sum over them."""
        target, mask = self.get_target(ctx), self.get_mask(ctx)
        if mask is None:
            return torch.tensor(target.numel(), dtype=torch.int64)
        self._masks(mask, target)
        # The mask's sum after broadcasting, which repeats each of its elements equally often.
        total = mask.sum(dtype=torch.float64 if mask.is_floating_point() else torch.int64)
        return total * (target.numel() // max(mask.numel(), 1))  # type: ignore[no-any-return]

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """
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
            total = self.elements(prediction, target).sum()
            loss = total / max(target.numel(), 1)
        else:
            weight = self.weight(ctx).to(prediction)
            # Replaced and not multiplied by 0: NaN would stay NaN, also in the gradient.
            target = torch.where(mask != 0, target, prediction.detach())
            total = (self.elements(prediction, target) * mask).sum()
            loss = total / torch.where(weight == 0, 1, weight)
        return LossOutput(loss, {self.metric: loss})

    def _masks(self, mask: Tensor, target: Tensor) -> None:
        fits = mask.dim() == target.dim() and all(
            m in (1, t) for m, t in zip(mask.shape, target.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{self.name}: ctx.{self.mask_key} has shape {list(mask.shape)}, which cannot mask "
                f"a target of {list(target.shape)}; each dimension has to be the same or 1, as "
                f"mask.unsqueeze(-1) makes a last one"
            )


class MSELoss(ElementwiseLoss):
    """The mean squared error."""

    metric = "mse"

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target, reduction="none")


class L1Loss(ElementwiseLoss):
    """The mean absolute error."""

    metric = "l1"

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(prediction, target, reduction="none")


class HuberLoss(ElementwiseLoss):
    """Half the squared error up to `delta`, and `delta * (|error| - delta / 2)` beyond it.

    Huber (1964), Robust Estimation of a Location Parameter.
    """

    metric = "huber"

    def __init__(
        self,
        *,
        delta: float = 1.0,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        name: str | None = None,
        contract: str | Contract | None = None,
    ) -> None:
        super().__init__(
            output_index=output_index,
            target_key=target_key,
            mask_key=mask_key,
            name=name,
            contract=contract,
        )
        if delta <= 0:
            raise ValueError(f"loss.delta={delta} must be positive")
        self.delta = delta

    def elements(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(prediction, target, reduction="none", delta=self.delta)
