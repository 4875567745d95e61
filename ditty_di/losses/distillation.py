"""A student's loss against what a teacher says of the same batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditty_di.contracts.grammar import Contract
from ditty_di.losses.calculator import LossCalculator, LossOutput
from ditty_di.processors.context import Context


class DistillationLoss(LossCalculator):
    """Kullback-Leibler divergence between teacher `p` and student `q`, in nats a position.

        T^2 * (forward * KL(p || q) + backward * KL(q || p)),  p, q = softmax(logits / T)

    The forward divergence makes the student cover all that the teacher does (Hinton, Vinyals, Dean
    (2015), Distilling the Knowledge in a Neural Network); the backward one makes it keep to what
    the teacher does most (Gu et al. (2024), MiniLLM). Gradients of soft targets shrink with `T^2`,
    so the factor keeps their size beside a cross-entropy when `T` changes.

    Args:
        forward_weight, backward_weight: of each divergence; 0 does not compute it.
        temperature: T.
        teacher_key: the teacher's logits in the context, as `ditty_di.processors.Teacher` writes
            them.
        labels: a position weighs nothing where the target is `ignore_index`; without, all weigh.
        shift: as in `CrossEntropyLoss`: position t is weighed by label t + 1.

    Shapes: both logits `[batch, ..., classes]`; target and mask `[batch, ...]`.
    Metrics: `forward_kl`, `backward_kl`, without weight and `T^2`.
    """

    def __init__(
        self,
        *,
        forward_weight: float = 1.0,
        backward_weight: float = 0.0,
        temperature: float = 1.0,
        teacher_key: str = "teacher_logits",
        labels: bool = True,
        shift: bool = False,
        ignore_index: int = -100,
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
        if temperature <= 0:
            raise ValueError(f"loss.temperature={temperature} must be positive")
        if min(forward_weight, backward_weight) < 0 or forward_weight == backward_weight == 0:
            raise ValueError(
                f"loss.forward_weight={forward_weight}, loss.backward_weight={backward_weight}: "
                f"write 0 or more, and not 0 for both"
            )
        self.forward_weight, self.backward_weight = forward_weight, backward_weight
        self.temperature, self.teacher_key = temperature, teacher_key
        self.labels, self.shift, self.ignore_index = labels, shift, ignore_index

    @classmethod
    def contract_for(
        cls,
        *,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        teacher_key: str = "teacher_logits",
        labels: bool = True,
        **others: Any,
    ) -> str | None:
        target = f", ctx.{target_key}:n:i64" if labels else ""
        mask = f", ctx.{mask_key}:n" if mask_key else ""
        teacher = f"ctx.{teacher_key}:n+1:f"
        return f"{output_index}:n+1:f | {teacher}{target}{mask} -> loss:0:f"

    def weight(self, ctx: Context) -> Tensor:
        """Positions that count."""
        valid = self._valid(ctx)
        if valid is not None:
            return valid.sum()
        shape = ctx.at(self.teacher_key).shape[:-1]
        rows = shape.numel() // shape[1] * (shape[1] - 1) if self.shift else shape.numel()
        return torch.tensor(rows, dtype=torch.int64)

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """
        Raises:
            ValueError: teacher and student have logits of different shapes.
        """
        student, teacher = self.get_prediction(model_output, ctx), ctx.at(self.teacher_key)
        if student.shape != teacher.shape:
            raise ValueError(
                f"{self.name}: the student's logits have shape {list(student.shape)} and the "
                f"teacher's {list(teacher.shape)}; both need the same vocabulary"
            )
        if self.shift:
            student, teacher = student[:, :-1], teacher[:, :-1]
        q = F.log_softmax(student.float() / self.temperature, -1)
        p = F.log_softmax(teacher.detach().float() / self.temperature, -1)
        total: Any = 0.0
        metrics: dict[str, Any] = {}
        for key, weight, model, target in (
            ("forward_kl", self.forward_weight, q, p),
            ("backward_kl", self.backward_weight, p, q),
        ):
            if weight:
                # torch's first argument is the second of the divergence
                divergence = F.kl_div(model, target, reduction="none", log_target=True).sum(-1)
                metrics[key] = self._mean(divergence, ctx)
                total = total + weight * metrics[key]
        return LossOutput(total * self.temperature**2, metrics)

    def _mean(self, divergence: Tensor, ctx: Context) -> Tensor:
        valid = self._valid(ctx)
        if valid is None:
            return divergence.mean()
        return torch.where(valid, divergence, 0.0).sum() / valid.sum().clamp(min=1)

    def _valid(self, ctx: Context) -> Tensor | None:
        """Which positions count; None when all do."""
        target, mask = self.get_target(ctx) if self.labels else None, self.get_mask(ctx)
        valid = target != self.ignore_index if target is not None else None
        if mask is not None:
            valid = mask != 0 if valid is None else valid & (mask != 0)
        return valid[:, 1:] if self.shift and valid is not None else valid
