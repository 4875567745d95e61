"""Distillation: a student's logits against a teacher's on the same batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditty_di.batch import Context
from ditty_di.losses.calculator import LossCalculator, LossOutput


@dataclass(eq=False, repr=False, kw_only=True)
class DistillationLoss(LossCalculator):
    """Kullback-Leibler divergence between teacher `p` and student `q`, in nats per position.

        T^2 * (forward * KL(p || q) + backward * KL(q || p)),  p, q = softmax(logits / T)

    The forward divergence makes the student cover all modes of the teacher (Hinton, Vinyals, Dean
    (2015), Distilling the Knowledge in a Neural Network); the backward one makes it concentrate on
    the largest (Gu et al. (2024), MiniLLM). Gradients of soft targets shrink with `T^2`, so the
    factor keeps their size beside a cross-entropy when `T` changes.

    Args:
        forward_weight: factor of KL(p || q); 0 does not compute it.
        backward_weight: factor of KL(q || p); 0 does not compute it.
        temperature: T, above 0.
        teacher_key: context key of the teacher's logits, as `ditty_di.processors.Teacher` writes
            them.
        labels: exclude positions whose target is `ignore_index`; False counts all positions.
        shift: position t counts if label t + 1 does, as in `CrossEntropyLoss`.
        ignore_index: label value of excluded positions.
        output_index: see `LossCalculator`, as for the other arguments.
        target_key: context key of the labels.
        mask_key: context key of a mask; positions are excluded where it is 0.
        name: prefix of its metrics.
        contract: what it reads.

    Shapes: both logits `[batch, ..., classes]`; target and mask `[batch, ...]`.
    Metrics: `forward_kl`, `backward_kl`, without factor and `T^2`.
    """

    forward_weight: float = 1.0
    backward_weight: float = 0.0
    temperature: float = 1.0
    teacher_key: str = "teacher_logits"
    labels: bool = True
    shift: bool = False
    ignore_index: int = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature={self.temperature} must be positive")
        weights = self.forward_weight, self.backward_weight
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                f"loss.forward_weight={self.forward_weight}, "
                f"loss.backward_weight={self.backward_weight}: write 0 or more, and not 0 for both"
            )

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
        """Return the contract of a loss with these arguments."""
        target = f", ctx.{target_key}:n:i64" if labels else ""
        mask = f", ctx.{mask_key}:n" if mask_key else ""
        teacher = f"ctx.{teacher_key}:n+1:f"
        return f"{output_index}:n+1:f | {teacher}{target}{mask} -> loss:0:f"

    def count_valid(self, ctx: Context) -> Tensor:
        """Return the number of positions that count, shape `[]`, int64."""
        valid = self._valid(ctx)
        if valid is not None:
            return valid.sum()
        shape = ctx.at(self.teacher_key).shape[:-1]
        rows = shape.numel() // shape[1] * (shape[1] - 1) if self.shift else shape.numel()
        return torch.tensor(rows, dtype=torch.int64)

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """Return the weighted sum of the mean divergences.

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
        valid = self._valid(ctx)
        total: Any = 0.0
        metrics: dict[str, Any] = {}
        for key, weight, model, target in (
            ("forward_kl", self.forward_weight, q, p),
            ("backward_kl", self.backward_weight, p, q),
        ):
            if weight:
                # torch's first argument is the second of the divergence: [batch, ...]
                divergence = F.kl_div(model, target, reduction="none", log_target=True).sum(-1)
                if valid is None:
                    metrics[key] = divergence.mean()
                else:
                    kept = torch.where(valid, divergence, 0.0).sum()
                    metrics[key] = kept / valid.sum().clamp(min=1)
                total = total + weight * metrics[key]
        return LossOutput(total * self.temperature**2, metrics)

    def _valid(self, ctx: Context) -> Tensor | None:
        """Return which positions count `[batch, ...]`, bool; None when all do."""
        target, mask = self.get_target(ctx) if self.labels else None, self.get_mask(ctx)
        valid = target != self.ignore_index if target is not None else None
        if mask is not None:
            valid = mask != 0 if valid is None else valid & (mask != 0)
        return valid[:, 1:] if self.shift and valid is not None else valid
