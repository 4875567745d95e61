"""Windows that are passed over without an update, on all ranks alike, and how many may be."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

#: Gradients that overflow at a scale below it are not finite without it either.
_SMALLEST_SCALE = 1.0


class SkipBudget:
    """Counts what was skipped; fails when it is more than `allowed`.

    A window without a finite loss and gradient, or without a single label, costs one. An overflow
    that the gradient scaler answers, and a window that preprocessors rejected, cost nothing.
    """

    def __init__(
        self, allowed: int, *, scaler: torch.amp.GradScaler, rank: int, dataloader: Any
    ) -> None:
        self.allowed, self.scaler, self.rank = allowed, scaler, rank
        self._last_rows = getattr(dataloader, "last_rows", None)
        self.skipped = 0

    def pass_over(
        self, step: int, values: dict[str, float], counts: Tensor, micro_batches: int
    ) -> None:
        """Called instead of an update, of a window of so many micro-batches taken.

        Raises:
            FloatingPointError: the budget is used up.
        """
        overflow = self.scaler.is_enabled() and bool(counts.any())
        scale = self.scaler.get_scale()
        # The scaler's business, down to the smallest scale.
        lowers = overflow and math.isfinite(values["loss"]) and scale >= _SMALLEST_SCALE
        if not lowers:
            message = self._message(step, values, counts, micro_batches)
            # Before anything is changed: the step can be undone.
            if self.skipped >= self.allowed:
                raise FloatingPointError(
                    f"{message}; nothing was updated. trainer.max_skipped_steps="
                    f"{self.skipped + 1} would pass over it"
                )
            self.skipped += 1
            log.warning("%s; skipped %d of %d", message, self.skipped, self.allowed)
        if self.scaler.is_enabled():
            # Every rank sets the scale, also one whose own shard of the gradient was finite.
            factor = self.scaler.get_backoff_factor() if overflow else 1.0
            self.scaler.update(new_scale=scale * factor)
            if overflow:  # it grows again after as many good steps as ever
                self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})

    def _message(
        self, step: int, values: dict[str, float], counts: Tensor, micro_batches: int
    ) -> str:
        what = f"is not finite: {values}" if counts.any() else "has no label to learn from"
        rows = (
            self._last_rows(micro_batches) if self._last_rows else "that the loader does not name"
        )
        return f"step {step} {what} (rank {self.rank} had rows {rows})"
