"""The model as one rank trains it, and pipeline parallelism on every torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.compat import PIPELINE_TAKES_MICROBATCHES

if TYPE_CHECKING:
    from ditty_di.protocols import Loss


class WindowLoss:
    """What a pipeline schedule calls with a micro-batch's output and labels.

    Schedules of older torch cannot pass the window's count to the loss, so it is kept here.
    """

    def __init__(self, loss_fn: Loss) -> None:
        self.loss_fn = loss_fn
        self.global_count: Tensor | None = None

    def __call__(self, output: Any, labels: Tensor, **ignored: Any) -> Tensor:
        assert self.global_count is not None
        return self.loss_fn(output, labels, self.global_count)[0]


@dataclass
class Parts:
    """The model as this rank trains it: one module, or its stages of a pipeline."""

    modules: list[nn.Module]
    schedule: Any = None
    window_loss: WindowLoss | None = None
    has_first_stage: bool = True
    has_last_stage: bool = True

    def sync_gradients(self, now: bool) -> None:
        """Whether the next backward pass reduces gradients over the data-parallel ranks."""
        for module in self.modules:
            set_sync: Any = getattr(module, "set_requires_gradient_sync", None)
            if set_sync is not None:
                set_sync(now)

    def run_schedule(
        self, window: list[tuple[Tensor, Tensor, dict[str, Any]]], global_count: Tensor
    ) -> Tensor:
        """Forward and backward of a window's micro-batches (input, labels, keywords of forward).

        Returns:
            The loss on the rank of the last stage, 0 on the others; shape `[]`.
        """
        assert self.window_loss is not None
        self.window_loss.global_count = global_count
        inputs, labels, keywords = map(list, zip(*window, strict=True))
        losses: list[Tensor] | None = [] if self.has_last_stage else None
        if PIPELINE_TAKES_MICROBATCHES:
            self.schedule.step(
                arg_mbs=[(x,) for x in inputs] if self.has_first_stage else None,
                kwarg_mbs=keywords,
                target_mbs=labels if self.has_last_stage else None,
                losses=losses,
                return_outputs=False,
            )
        else:
            # The schedule cuts the whole window again, into the same micro-batches.
            self.schedule.step(
                *([torch.cat(inputs)] if self.has_first_stage else []),
                target=torch.cat(labels) if self.has_last_stage else None,
                losses=losses,
                return_outputs=False,
                **{key: torch.cat([k[key] for k in keywords]) for key in keywords[0]},
            )
        if losses is None:
            return torch.zeros_like(global_count.sum())
        return torch.stack([loss.detach() for loss in losses]).sum().to(global_count.device)
