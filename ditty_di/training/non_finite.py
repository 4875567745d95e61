"""Skip optimizer steps on all ranks, up to a budget: values that are not finite, and spikes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditty_di.models.weights import local
from ditty_di.protocols import Position, SpikePolicy
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
        same_on_ranks: average them over all ranks on the device. They are equal but for rounding,
            and so exactly equal afterwards: ranks that compare them with a limit must agree.

    Attributes:
        limits: largest values with which the step may update; not compared unless finite.
    """

    def __init__(self, loss: Tensor, grad_norm: Tensor, *, same_on_ranks: bool = False) -> None:
        self._on_device = torch.stack([loss.double(), grad_norm.to(loss.device).double()])
        if same_on_ranks and (ranks := dist.get_world_size()) > 1:
            dist.all_reduce(self._on_device)  # a sum of equal float32 values is exact in float64
            self._on_device /= ranks
        self.limits = (math.inf, math.inf)
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

    def accepted(self) -> bool:
        """Return whether both are finite and within the limits."""
        within = (v <= limit for v, limit in zip(self.values(), self.limits, strict=True))
        return self.finite() and all(within)

    def rejected_on_device(self) -> Tensor:
        """Return 0.0 where both are `accepted`, otherwise 1.0, without a wait; shape `[]`."""
        accepted = self._on_device.isfinite().all()
        for value, limit in zip(self._on_device, self.limits, strict=True):
            if math.isfinite(limit):
                accepted = accepted & (value <= limit)
        return accepted.logical_not().float()


class Taken(Protocol):
    """What counts the micro-batches of a step (`GradientAccumulation`)."""

    taken: int


class NonFiniteGuard:
    """Count skipped optimizer steps; fail when there are more than allowed.

    A step with non-finite loss or gradients, or without any valid label, costs one. An overflow
    that the gradient scaler handles, and a step whose batches preprocessors rejected, cost nothing.
    A finite step beyond the limits of the spike policy is counted by the policy.

    Args:
        allowed: optimizer steps that may be skipped.
        position: its `step` is the current optimizer step.
        accumulation: its `taken` is the number of micro-batches of the current step.
        scaler: gradient scaler of the training.
        rank: rank, for messages.
        dataloader: its `last_rows(n)`, if any, names the rows of the last micro-batches.
        spikes: limits loss and gradient norm; None compares neither.
        on_read: called with the number and the loss of each step, once the host has read it.

    Attributes:
        skipped: steps skipped so far, without spikes.
        last_loss: the loss of the last step that was read; None before the first.
    """

    def __init__(
        self,
        allowed: int,
        *,
        position: Position,
        accumulation: Taken,
        scaler: torch.amp.GradScaler,
        rank: int,
        dataloader: Any,
        spikes: SpikePolicy | None = None,
        on_read: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        self.allowed, self.scaler, self.rank, self.spikes = allowed, scaler, rank, spikes
        self._position, self._accumulation, self._on_read = position, accumulation, on_read
        self._last_rows = getattr(dataloader, "last_rows", None)
        self._zero_gradients = 0
        self.skipped = 0
        self.last_loss: float | None = None
        #: The last step if its values are not read yet: number, values, valid elements and rows.
        self._pending: tuple[int, StepValues, Tensor, list[int] | None] | None = None

    @property
    def pending(self) -> bool:
        """Whether the values of the last step are not read yet."""
        return self._pending is not None

    def defer_read(self) -> bool:
        """Read the values of the last step; return whether those of this one may be read later.

        Not if skipping this step would end the training: it is undone then, before the next begins.
        """
        self.read()
        left = self.spikes is None or self.spikes.may_skip()
        return left and self.skipped < self.allowed

    def limits(self) -> tuple[float, float]:
        """Return the largest loss and gradient norm of this step, from those of all before it."""
        self.read()
        return self.spikes.limits() if self.spikes else (math.inf, math.inf)

    def done(self, values: StepValues, num_valid_global: Tensor) -> None:
        """Note that the current step is done; read its values, or keep them to be read later.

        Args:
            values: of the step.
            num_valid_global: what the loss counted over the step.
        """
        valid = bool(num_valid_global.any())
        if values.pending and valid:
            self._pending = self._position.step, values, num_valid_global, self._rows()
        else:
            self._note(self._position.step, values, updated=valid and values.accepted())

    def read(self) -> None:
        """Read the values of the last step if they are pending; count it if it was skipped."""
        if self._pending is not None:
            (step, values, num_valid_global, rows), self._pending = self._pending, None
            if not (updated := values.accepted()):
                self._skip(step, values, num_valid_global, rows)
            self._note(step, values, updated=updated)

    def skip(self, values: StepValues, num_valid_global: Tensor) -> None:
        """Skip the current step instead of updating.

        Args:
            values: of the step.
            num_valid_global: what the loss counted over the step.

        Raises:
            FloatingPointError: the budget is used up.
        """
        self._skip(self._position.step, values, num_valid_global, self._rows())

    def get_metrics(self) -> dict[str, float]:
        """Return `skipped_steps` where any may be, and `skipped_spikes` with a spike policy."""
        found = {"skipped_steps": float(self.skipped)} if self.allowed else {}
        return found | ({"skipped_spikes": float(self.spikes.skipped)} if self.spikes else {})

    def _rows(self) -> list[int] | None:
        """Return the row numbers of this rank's part of the step; None if they are unknown."""
        return self._last_rows(self._accumulation.taken) if self._last_rows else None

    def _skip(
        self, step: int, values: StepValues, num_valid_global: Tensor, rows: list[int] | None
    ) -> None:
        which = "of unknown row numbers" if rows is None else f"rows {rows}"
        had = f"(rank {self.rank} had {which})"
        scaled, scale = self.scaler.is_enabled(), self.scaler.get_scale()
        valid = bool(num_valid_global.any())
        overflow = scaled and valid and not values.finite()
        if valid and values.finite():
            assert self.spikes is not None
            self.spikes.skip(step, values, had)
        # The scaler handles an overflow, down to the smallest scale.
        elif not (overflow and math.isfinite(values["loss"]) and scale >= _SMALLEST_SCALE):
            what = f"is not finite: {dict(values)}" if valid else "has no label to learn from"
            message = f"step {step} {what} {had}"
            # Raised before anything changes: the step can be undone.
            if self.skipped >= self.allowed:
                raise FloatingPointError(
                    f"{message}; nothing was updated. trainer.max_skipped_steps="
                    f"{self.skipped + 1} would skip it"
                )
            self.skipped += 1
            log.warning("%s; skipped %d of %d", message, self.skipped, self.allowed)
        if scaled:
            # Every rank sets the scale, also one whose own shard of the gradient was finite.
            factor = self.scaler.get_backoff_factor() if overflow else 1.0
            self.scaler.update(new_scale=scale * factor)
            if overflow:  # the scale grows again after a full growth interval
                self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})

    def _note(self, step: int, values: StepValues, *, updated: bool) -> None:
        """Keep a step's loss, and warn once when the gradient norm has been 0 for several steps."""
        self.last_loss = values["loss"]
        self._on_read(step, self.last_loss)
        if self.spikes is not None and updated:
            self.spikes.observe(values)
        self._zero_gradients = self._zero_gradients + 1 if values["grad_norm"] == 0.0 else 0
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
