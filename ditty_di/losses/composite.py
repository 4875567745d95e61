"""Several losses of one output, each over what it counts itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.contracts.grammar import Contract, as_contract
from ditty_di.contracts.stages import snake_case
from ditty_di.losses.calculator import as_context, labels_for
from ditty_di.losses.plain import as_loss

if TYPE_CHECKING:
    from ditty_di.protocols import Batch, Loss


class CompositeLoss(nn.Module):
    """The weighted sum of losses, each divided by its own global count.

    Args:
        losses: pairs of a loss and its weight. One of weight 0 is left out: neither counted nor
            computed nor trained. Parts may be composites, and losses on labels alone
            (`CrossEntropyLoss`, `LinearCrossEntropyLoss`), which get the context's `target`.
        name: what its metrics are called within another composite.
        contract: what it takes beside what its parts' contracts say.

    Metrics: `{part}/loss`, unweighted, `{part}/...` of each part's own, and `total`. A part is
    called by its name, or its class's in snake case; of equal ones the second has `_2`.

    Raises:
        ValueError: no part has a weight, or one is negative or not finite.
    """

    takes_context = True
    contract: Any = None
    parts_argument = "losses"

    def __init__(
        self,
        losses: Sequence[tuple[Loss, float]],
        *,
        name: str | None = None,
        contract: str | Contract | None = None,
    ) -> None:
        super().__init__()
        self.name = name or snake_case(type(self).__name__)
        self.contract = as_contract(contract if contract is not None else type(self).contract)
        self.weights: dict[str, float] = {}
        for called, loss, weight in _named(
            [(as_loss(loss), weight) for loss, weight in _pairs(losses)]
        ):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"loss: {called} has weight {weight}; write 0 or more")
            if weight:
                # As an attribute, so that a module in it is registered as one.
                setattr(self, _PART + called, loss)
                self.weights[called] = float(weight)
        if not self.weights:
            raise ValueError("loss: a composite needs a part whose weight is not 0")
        #: How many numbers `count` gives.
        self.counts = sum(getattr(part, "counts", 1) for _, part in self.parts)

    @classmethod
    def parts_for(cls, *, losses: Any = (), **others: Any) -> list[tuple[str, Any]]:
        """The parts by name, of what `losses` may be before they are built."""
        return [(called, loss) for called, loss, weight in _named(losses) if weight]

    @property
    def parts(self) -> list[tuple[str, Loss]]:
        """The parts that are computed, by their unique names."""
        return [(called, getattr(self, _PART + called)) for called in self.weights]

    def count(self, batch: Batch, /) -> Tensor:
        """What each part counts, on the CPU, float64; shape `[parts]`."""
        inputs, labels = batch
        return torch.cat(
            [
                part.count((inputs, labels_for(part, labels))).cpu().double().reshape(-1)
                for _, part in self.parts
            ]
        )

    def forward(
        self, output: Any, labels: Any, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the parts' shares, shape `[]`."""
        total: Any = 0.0
        metrics: dict[str, Tensor] = {}
        for called, part, count in self.counted(global_count):
            loss, own = self.call(part, output, labels, count)
            total = total + self.weights[called] * loss
            metrics |= part_metrics(called, loss, own)
        return total, {**metrics, "total": total.detach()}

    def call(
        self, part: Loss, output: Any, labels: Any, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A part's share of its mean, and its metrics."""
        return part(output, labels_for(part, labels), count)

    def counted(self, global_count: Tensor) -> Iterator[tuple[str, Loss, Tensor]]:
        """Each part with its own global count; nothing to count is no reason to divide by 0."""
        counts = torch.where(global_count == 0, 1, global_count)
        at = 0
        for called, part in self.parts:
            size = getattr(part, "counts", None)  # of a composite
            yield called, part, counts[at] if size is None else counts[at : at + size]
            at += size or 1

    def share(self, labels: Any, global_count: Tensor) -> Tensor:
        """Which part of `global_count` the batch is, for each part; shape `[parts]`."""
        return torch.stack(
            [share(part, labels, count) for _, part, count in self.counted(global_count)]
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{called}={weight:g}" for called, weight in self.weights.items())


_PART = "part_"


def part_metrics(called: str, loss: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's metrics under its name."""
    named = {f"{called}/{key}": value.detach() for key, value in own.items()}
    return {**named, f"{called}/loss": loss.detach()}


def _named(losses: Any) -> Iterator[tuple[str, Any, float]]:
    """(unique name, loss, weight) of pairs whose losses may be nodes of a configuration."""
    used: set[str] = set()
    for loss, weight in _pairs(losses):
        name = _name(loss)
        if "." in name or "/" in name:
            raise ValueError(f"loss: {name!r} is no name for a part; leave out dots and slashes")
        unique, n = name, 1
        while unique in used:
            n += 1
            unique = f"{name}_{n}"
        used.add(unique)
        yield unique, loss, weight


def _pairs(losses: Any) -> Iterator[tuple[Any, float]]:
    for pair in losses:
        try:
            loss, weight = pair
            yield loss, float(weight)
        except (TypeError, ValueError):
            raise ValueError(
                f"loss: a composite takes pairs of a loss and its weight; got {pair!r:.80}"
            ) from None


def _name(loss: Any) -> str:
    if isinstance(loss, Mapping):
        return str(loss.get("name") or snake_case(str(loss["_target_"]).rpartition(".")[2]))
    return str(getattr(loss, "name", None) or snake_case(type(loss).__name__))


def share(part: Loss, labels: Any, global_count: Tensor) -> Tensor:
    """Which part of `global_count` a batch is, shape `[]`: over a window 1, or 0 if all is 0."""
    own: Any = getattr(part, "share", None)
    if own is not None:
        return own(as_context(labels), global_count).mean()  # type: ignore[no-any-return]
    ctx = as_context(labels)
    inputs = ctx["original_batch"][0] if "original_batch" in ctx else {}
    count = part.count((inputs, labels_for(part, ctx))).to(global_count.device)
    return (count / global_count).float()
