"""The model as one rank trains it, and pipeline parallelism on every torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditty_di.compat import PIPELINE_TAKES_MICROBATCHES
from ditty_di.metrics.validation import preserved_rng
from ditty_di.runtime import seed_everything

if TYPE_CHECKING:
    from ditty_di.protocols import Loss
    from ditty_di.runtime import Runtime


class WindowLoss:
    """What a pipeline schedule calls with a micro-batch's output and its number in the window.

    Schedules take tensors as targets, those of older torch cut them into pieces, and they cannot
    pass the window's count to the loss: so the labels (or contexts) and the count are kept here.
    """

    def __init__(self, loss_fn: Loss) -> None:
        self.loss_fn = loss_fn
        self.labels: list[Any] = []
        self.metrics: dict[int, dict[str, Tensor]] = {}
        self.global_count: Tensor | None = None

    def begin(self, labels: list[Any], global_count: Tensor) -> None:
        """A window."""
        self.labels, self.metrics, self.global_count = labels, {}, global_count

    def __call__(self, output: Any, number: Tensor, **ignored: Any) -> Tensor:
        assert self.global_count is not None
        n = int(number)
        if n >= len(self.labels):  # only fills up the window
            tensors = [x for x in tree_leaves(output) if torch.is_tensor(x) and x.requires_grad]
            return torch.stack([0.0 * x.sum() for x in tensors]).sum()
        loss, metrics = self.loss_fn(output, self.labels[n], self.global_count)
        self.metrics[n] = metrics  # the last call counts: before the first window shapes are tried
        return loss


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
        self, window: list[tuple[Tensor, Any, dict[str, Any]]], global_count: Tensor, size: int
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Forward and backward of a window's micro-batches (input, labels, keywords of forward).

        A schedule runs `size` of them, always: a shorter window is filled up with its first one,
        weightless.

        Returns:
            The loss, shape `[]`, and each micro-batch's metrics on the rank of the last stage; 0
            and nothing on the others.
        """
        assert self.window_loss is not None
        self.window_loss.begin([labels for _, labels, _ in window], global_count)
        filled = window + window[:1] * (size - len(window))
        inputs, _, keywords = map(list, zip(*filled, strict=True))
        numbers = torch.arange(size)
        losses: list[Tensor] | None = [] if self.has_last_stage else None
        if PIPELINE_TAKES_MICROBATCHES:
            self.schedule.step(
                arg_mbs=[(x,) for x in inputs] if self.has_first_stage else None,
                kwarg_mbs=keywords,
                target_mbs=list(numbers.split(1)) if self.has_last_stage else None,
                losses=losses,
                return_outputs=False,
            )
        else:
            # The schedule cuts the whole window again, into the same micro-batches.
            self.schedule.step(
                *([torch.cat(inputs)] if self.has_first_stage else []),
                target=numbers if self.has_last_stage else None,
                losses=losses,
                return_outputs=False,
                **{key: torch.cat([k[key] for k in keywords]) for key in keywords[0]},
            )
        if losses is None:
            return torch.zeros_like(global_count.sum()), []
        total = torch.stack([loss.detach() for loss in losses]).sum()
        return total.to(global_count.device), list(self.window_loss.metrics.values())


class AlikeOnStages:
    """Gives all stages of a pipeline the same random numbers while they prepare a micro-batch.

    Otherwise each stage has its own: the first would get the input that a preprocessor made, and
    the last the target that it made with other noise. Numbers differ between steps, micro-batches
    and data-parallel ranks; the streams of training go on as if nothing had been drawn.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._step = self._number = 0

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        self._number = self._number + 1 if step == self._step else 0
        self._step = step
        runtime = self.runtime
        words = [runtime.seed % 2**32, runtime.dp_rank, step, self._number]
        with preserved_rng(runtime.device):
            seed_everything(int(np.random.SeedSequence(words).generate_state(1)[0]))
            yield
