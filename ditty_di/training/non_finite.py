"""Skip optimizer steps with non-finite loss or gradients on all ranks, up to a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
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


class StepValues(Mapping[str, float]):
    """`loss` and `grad_norm` of an optimizer step; the host waits for them at the first look.

    Args:
        loss: over all ranks, on the device, shape `[]`.
        grad_norm: before clipping, shape `[]`.
    """

    def __init__(self, loss: Tensor, grad_norm: Tensor) -> None:
        self._on_device = torch.stack([loss.double(), grad_norm.to(loss.device).double()])
        self._on_host = self._on_device.to("cpu", non_blocking=True)
        self._copied = None if loss.device.type == "cpu" else torch.Event(loss.device)
        if self._copied is not None:
            self._copied.record()
        self._values: dict[str, float] = {}

    def __getitem__(self, name: str) -> float:
        if not self._values:
            if self._copied is not None:
                self._copied.synchronize()
            self._values = dict(zip(self, self._on_host.tolist(), strict=True))
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("loss", "grad_norm"))

    def __len__(self) -> int:
        return 2

    @property
    def pending(self) -> bool:
        """Whether the host has not read them yet."""
        return not self._values

    def finite(self) -> bool:
        """Return whether both are finite."""
        return all(map(math.isfinite, self.values()))

    def non_finite_on_device(self) -> Tensor:
        """Return 0.0 where both are finite, otherwise 1.0, without a wait; shape `[]`."""
        return self._on_device.isfinite().all().logical_not().float()


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

    def rows(self, micro_batches: int) -> list[int] | None:
        """Return the row numbers of this rank's last micro-batches; None if they are unknown.

        Args:
            micro_batches: number of micro-batches that the step was taken from.
        """
        return self._last_rows(micro_batches) if self._last_rows else None

    def skip(
        self,
        step: int,
        values: Mapping[str, float],
        num_valid_global: Tensor,
        rows: list[int] | None,
    ) -> None:
        """Skip an optimizer step instead of updating.

        Args:
            step: optimizer step.
            values: `loss` and `grad_norm`.
            num_valid_global: what the loss counted over the step.
            rows: the step's `rows`.

        Raises:
            FloatingPointError: the budget is used up.
        """
        overflow = self.scaler.is_enabled() and bool(num_valid_global.any())
        scale = self.scaler.get_scale()
        # The scaler handles an overflow, down to the smallest scale.
        if not (overflow and math.isfinite(values["loss"]) and scale >= _SMALLEST_SCALE):
            valid = bool(num_valid_global.any())
            what = f"is not finite: {dict(values)}" if valid else "has no label to learn from"
            which = "of unknown row numbers" if rows is None else f"rows {rows}"
            message = f"step {step} {what} (rank {self.rank} had {which})"
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
