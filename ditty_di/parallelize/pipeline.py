"""Pipeline parallelism on every torch: one schedule step over a window of micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditty_di.compat import PIPELINE_TAKES_MICROBATCHES

if TYPE_CHECKING:
    from ditty_di.protocols import Loss
    from ditty_di.trainer import Trainer


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


def pipeline_step(
    trainer: Trainer,
    *,
    input_dict_mbs: list[dict[str, Tensor]],
    label_mbs: list[Tensor],
    global_valid_tokens: Tensor,
) -> Tensor:
    """Runs the schedule over the micro-batches; the loss on the last stage, 0 on the others."""
    arguments, labels, keywords = [], [], []
    for inputs, label in zip(input_dict_mbs, label_mbs, strict=True):
        first, label, extra = trainer.post_dataloading_process(inputs, label)
        arguments.append((first,))
        labels.append(label)
        keywords.append(extra)
    parts = trainer.parts
    assert parts.window_loss is not None
    parts.window_loss.global_count = global_valid_tokens
    losses: list[Tensor] | None = [] if parts.has_last_stage else None
    with trainer.train_context():
        if PIPELINE_TAKES_MICROBATCHES:
            parts.schedule.step(
                arg_mbs=arguments if parts.has_first_stage else None,
                kwarg_mbs=keywords,
                target_mbs=labels if parts.has_last_stage else None,
                losses=losses,
                return_outputs=False,
            )
        else:
            # The schedule cuts the whole window again, into the same micro-batches.
            whole = {key: torch.cat([k[key] for k in keywords]) for key in keywords[0]}
            parts.schedule.step(
                *([torch.cat([a[0] for a in arguments])] if parts.has_first_stage else []),
                target=torch.cat(labels) if parts.has_last_stage else None,
                losses=losses,
                return_outputs=False,
                **whole,
            )
    if losses is None:
        return torch.zeros((), device=trainer.device)
    return torch.stack([loss.detach() for loss in losses]).sum().to(trainer.device)
