"""Base class of losses that are normalized over a whole optimizer step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ditty_di.batch import Batch


class Loss(nn.Module):
    """A sum over valid elements, divided by their number in the whole optimizer step.

    `num_valid` counts the valid elements (tokens, elements or rows) of a batch before the model
    runs. The trainer sums the counts over all micro-batches and data-parallel ranks and passes the
    total to `forward`. So micro-batches add up to one large batch, and ranks to one rank.

    A loss whose elements have the shape of the labels may tell them apart by two more methods, for
    metrics of each source of a mixture (`ditty_di.training.sources`): `valid(batch)`, bool in that
    shape, of which `num_valid` is the sum, and `element_losses(output, batch)`, the loss of each, 0
    where it is not valid. The loss is their sum divided by `num_valid_global`, and it has no
    metrics. A subclass that overrides `forward` has no elements unless it overrides both.

    Four more members are optional: `prepare_model(model)` returns the model as the loss needs it,
    before it is sharded; `summarize(metrics)` makes the metrics to report of their sums over the
    optimizer step, which may have any shape until then; `of_stage(batch, num_valid_global)` returns
    the part of a pipeline stage before the last one, which does not need the model's output; `fits`
    are rules about model and layout (`ditty_di.parallelize.fits`).

    Any object with `num_valid` and `__call__` of these signatures fits the trainer's `loss_fn` slot
    (`ditty_di.protocols.Loss`).
    """

    #: None if `num_valid` has shape `[]`; n if it has shape `[n]`, as for the parts of a composite.
    num_counts: int | None = None
    #: Method of a batch, or None: see above.
    valid: Any = None
    #: Method of output and batch, or None: see above.
    element_losses: Any = None

    #: Whether it takes logits whose vocabulary is split over ranks, as a `DTensor`. Other losses
    #: get whole logits.
    takes_split_logits: bool = False

    #: Whether it is a sum over tokens, of which ranks with parts of sequences each compute theirs.
    takes_split_sequences: bool = False

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return the number of valid elements in a batch, shape `[]`.

        Args:
            batch: on any device, after the preprocessors.
        """
        raise NotImplementedError(f"{type(self).__name__} has no num_valid(batch)")

    def forward(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's part of the loss, and of each metric, shapes `[]`.

        Args:
            output: the model's output after the postprocessors.
            batch: the batch it was computed from.
            num_valid_global: `num_valid` summed over the optimizer step, on the output's device.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(output, batch, ...)")

    def share(self, batch: Batch, num_valid_global: Tensor) -> Tensor:
        """Return the batch's fraction of the valid elements, shape `[]`, in float32.

        Args:
            batch: the batch.
            num_valid_global: `num_valid` summed over the optimizer step.
        """
        return (self.num_valid(batch).to(num_valid_global.device) / num_valid_global).float()
