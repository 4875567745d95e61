"""Losses and valid labels of each source of a mixture."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.batch import Batch
from ditty_di.models.weights import local
from ditty_di.protocols import Loss
from ditty_di.training.gradients import MetricAccumulator

log = logging.getLogger(__name__)

#: Name of the metric that `LossBySource` adds to those of its loss.
BY_SOURCE = "loss_by_source"
OTHER_SHAPE = """\
the batch's `source` has shape {source} and its labels have {labels}; it must be the source of \
each row, [rows], or of each label, in the shape of the labels. A processor that changes the rows \
of a batch changes ctx["source"] too"""


NO_SOURCE = """\
no micro-batch says its `source`: the collate function must keep this input of the rows, or there \
losses of the sources %s are missing"""


class LossBySource:
    """A loss that also reports its sum over the labels of each source.

    It replaces its loss where that is called, with the same value, and has its attributes, such as
    `ignore_index`. A loss says which labels are valid, and the loss of each, by `valid` and
    `element_losses` (`ditty_di.losses.Loss`).

    Args:
        loss_fn: the training loss.
        sources: names of the sources, by number; empty for data without sources.

    Attributes:
        knows_valid: whether the valid labels of each source can be counted.
        knows_losses: whether the loss of each label is known.
    """

    def __init__(self, loss_fn: Loss, sources: Iterable[str]) -> None:
        self.loss_fn, self.sources = loss_fn, list(sources)
        self.knows_valid = bool(self.sources) and callable(getattr(loss_fn, "valid", None))
        self.knows_losses = self.knows_valid and _gives_elements(loss_fn)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loss_fn"], name)

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Return the number of valid labels of each source, float64 `[sources]`.

        Args:
            batches: micro-batches on one device, after the preprocessors; one without `source` has
                no row of any.
        """
        counts = [
            self._sum(batch, self.loss_fn.valid(batch))  # type: ignore[attr-defined]
            for batch in batches
            if self.knows_valid and "source" in batch.context
        ]
        size = len(self.sources)
        return torch.stack(counts).sum(0) if counts else torch.zeros(size, dtype=torch.float64)

    def means(self, sums: Sequence[float], num_valid: Sequence[float]) -> dict[str, float]:
        """Return `loss/NAME` of each source with valid labels; {} where losses are not known.

        Args:
            sums: summed loss of each source.
            num_valid: valid labels of each.
        """
        named = zip(self.sources, sums, num_valid, strict=True) if self.knows_losses else ()
        return {f"loss/{name}": total / number for name, total, number in named if number}

    def __call__(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss with its metrics, and as metric `BY_SOURCE` the sums, `[sources]`."""
        if not self.knows_losses or "source" not in batch.context:
            return self.loss_fn(output, batch, num_valid_global)
        losses = self.loss_fn.element_losses(output, batch)  # type: ignore[attr-defined]
        return losses.sum() / num_valid_global, {BY_SOURCE: self._sum(batch, losses.detach())}

    def _sum(self, batch: Batch, elements: Tensor) -> Tensor:
        """Return the sum over the elements of each source, float64 `[sources]`, without a wait."""
        elements, source = local(elements), batch.context["source"]
        if source.dim() == 1 and len(source) == len(elements):
            source = source.view(-1, *[1] * (elements.dim() - 1)).expand_as(elements)
        if source.shape != elements.shape:
            shapes = {"source": list(source.shape), "labels": list(elements.shape)}
            raise ValueError(OTHER_SHAPE.format(**shapes))
        sums = torch.zeros(len(self.sources), dtype=torch.float64, device=elements.device)
        return sums.index_add_(0, source.flatten(), elements.flatten().double())


def _gives_elements(loss_fn: Any) -> bool:
    """Return whether one class defines both what is called and `element_losses`.

    A subclass with another loss has the elements of its base class, which are not its own. Nor can
    parameters of a loss be used but by its `forward`: they may be sharded.
    """
    called = "forward" if isinstance(loss_fn, nn.Module) else "__call__"
    owners = [
        next((kind for kind in type(loss_fn).__mro__ if name in vars(kind)), None)
        for name in (called, "element_losses")
    ]
    has_own = callable(getattr(loss_fn, "element_losses", None)) and owners[0] is owners[1]
    return has_own and not (
        isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters())
    )


class SourceMetrics:
    """Metrics of each source of the training data.

    `loss/NAME` is the mean over the valid labels of all ranks since the last report, for a source
    that had any; `tokens/NAME` is their number since the training began.

    Args:
        loss_fn: counts and sums.
        metrics: sums over the ranks.
    """

    def __init__(self, loss_fn: LossBySource, metrics: MetricAccumulator) -> None:
        self.loss_fn, self.metrics = loss_fn, metrics
        self.names = loss_fn.sources
        self.tokens = dict.fromkeys(self.names, 0)
        self._reported = dict(self.tokens)
        self._sums = self._no_sums()
        self._warned = False

    def say(self) -> None:
        """Log once which metrics there are not, of a mixture."""
        if self.names and not self.loss_fn.knows_losses:
            count = "their rows and tokens" if self.loss_fn.knows_valid else "their rows"
            log.info(
                "metrics of the sources %s: %s are counted, but no losses: %s does not give the "
                "loss of each label (ditty_di.losses.Loss.element_losses)",
                *(", ".join(self.names), count, type(self.loss_fn.loss_fn).__name__),
            )

    def add(self, sums: Tensor | None, num_valid: Sequence[float]) -> None:
        """Add an optimizer step.

        Args:
            sums: this rank's summed losses `[sources]` on the device, or None.
            num_valid: valid labels of each source over all ranks.
        """
        if sums is not None:
            self._sums = self._sums + sums
        for name, number in zip(self.names, num_valid, strict=True):
            self.tokens[name] += int(number)

    def report(self) -> dict[str, float]:
        """Return the metrics, and begin the next means; collective."""
        if not self.loss_fn.knows_valid:
            return {}
        if not any(self.tokens.values()) and not self._warned:
            self._warned = True
            log.warning(NO_SOURCE, ", ".join(self.names))
        found = {f"tokens/{name}": float(number) for name, number in self.tokens.items()}
        if self.loss_fn.knows_losses:
            since = [number - self._reported[name] for name, number in self.tokens.items()]
            found |= self.loss_fn.means(self.metrics.sum(self._sums).tolist(), since)
        self._reported, self._sums = dict(self.tokens), self._no_sums()
        return found

    def state_dict(self) -> dict[str, int]:
        """Return the valid labels of each source so far."""
        return dict(self.tokens)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what `state_dict` returned; another source begins at 0."""
        self.tokens = {name: state_dict.get(name, 0) for name in self.names}
        self._reported, self._sums = dict(self.tokens), self._no_sums()

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(self.names), dtype=torch.float64, device=self.metrics.device)
