"""Skip optimizer steps with non-finite loss or gradients on all ranks, up to a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.models.weights import local
from ditty_di.runtime import Runtime

log = logging.getLogger(__name__)

#: Gradients that overflow at a smaller scale are not finite without scaling either.
_SMALLEST_SCALE = 1.0
#: Optimizer steps in a row with a gradient norm of exactly 0 after which a warning is logged.
ZERO_GRADIENTS = 10


class NonFiniteGuard:
    """Count skipped optimizer steps; fail when there are more than allowed.

    A step with non-finite loss or gradients, or without any valid label, costs one. An overflow
    that the gradient scaler handles, and a step whose batches preprocessors rejected, cost nothing.

    Args:
        allowed: optimizer steps that may be skipped.
        scaler: gradient scaler of the training.
        rank: rank, for messages.
        dataloader: its `last_rows(n)`, if any, names the rows of the last micro-batches.

    Attributes:
        skipped: steps skipped so far.
    """

    def __init__(
        self, allowed: int, *, scaler: torch.amp.GradScaler, rank: int, dataloader: Any
    ) -> None:
        self.allowed, self.scaler, self.rank = allowed, scaler, rank
        self._last_rows = getattr(dataloader, "last_rows", None)
        self._zero_gradients = 0
        self.skipped = 0

    def skip(
        self, step: int, values: dict[str, float], num_valid_global: Tensor, micro_batches: int
    ) -> None:
        """Skip an optimizer step instead of updating.

        Args:
            step: optimizer step.
            values: `loss` and `grad_norm`.
            num_valid_global: what the loss counted over the step.
            micro_batches: number of micro-batches that the step was taken from.

        Raises:
            FloatingPointError: the budget is used up.
        """
        overflow = self.scaler.is_enabled() and bool(num_valid_global.any())
        scale = self.scaler.get_scale()
        # The scaler handles an overflow, down to the smallest scale.
        if not (overflow and math.isfinite(values["loss"]) and scale >= _SMALLEST_SCALE):
            valid = bool(num_valid_global.any())
            what = f"is not finite: {values}" if valid else "has no label to learn from"
            rows = "of unknown row numbers"
            if self._last_rows:
                rows = f"rows {self._last_rows(micro_batches)}"
            message = f"step {step} {what} (rank {self.rank} had {rows})"
            # Raised before anything changes: the step can be undone.
            if self.skipped >= self.allowed:
                raise FloatingPointError(
                    f"{message}; nothing was updated. trainer.max_skipped_steps="
                    f"{self.skipped + 1} would skip it"
                )
            self.skipped += 1
            log.warning("%s; skipped %d of %d", message, self.skipped, self.allowed)
        if self.scaler.is_enabled():
            # Every rank sets the scale, also one whose own shard of the gradient was finite.
            factor = self.scaler.get_backoff_factor() if overflow else 1.0
            self.scaler.update(new_scale=scale * factor)
            if overflow:  # the scale grows again after a full growth interval
                self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})

    def watch(self, step: int, grad_norm: float) -> None:
        """Warn once when the gradient norm has been 0 for several steps.

        Args:
            step: optimizer step.
            grad_norm: global gradient norm before clipping.
        """
        self._zero_gradients = self._zero_gradients + 1 if grad_norm == 0.0 else 0
        if self._zero_gradients == ZERO_GRADIENTS:
            log.warning(
                "step %d: the gradient norm has been exactly 0 for %d steps, so nothing is "
                "learned; the loss may no longer depend on the trained parameters (after a too "
                "high learning rate, for example), or parts of the graph are detached",
                step,
                ZERO_GRADIENTS,
            )


def non_finite_parameters(modules: Iterable[Any]) -> str | None:
    """Return which trainable parameters of this rank are not finite; None when all are.

    Args:
        modules: modules; other objects are ignored.
    """
    named = [
        (name, local(p.detach()))
        for part in modules
        if isinstance(part, nn.Module)
        for name, p in part.named_parameters()
        if p.requires_grad and p.is_floating_point()
    ]
    finite = [p.isfinite().all() for _, p in named]
    bad = [] if not finite else torch.stack(finite).logical_not().nonzero().flatten().tolist()
    which = ", ".join(named[i][0] for i in bad[:3])
    return f"{len(bad)} parameters are not finite ({which})" if bad else None


def require_finite_parameters(step: int, modules: Iterable[Any], runtime: Runtime) -> None:
    """Raise on all ranks if trainable parameters of any rank are not finite.

    Args:
        step: optimizer step, for the message.
        modules: modules; other objects are ignored.
        runtime: for the agreement of the ranks.

    Raises:
        FloatingPointError: the training cannot continue from these parameters.
    """
    problem = non_finite_parameters(modules)
    if runtime.any(problem is not None):
        raise FloatingPointError(
            f"step {step}: {problem or 'parameters of another rank are not finite'}, so it is not "
            f"saved; a lower learning rate may help"
        )
