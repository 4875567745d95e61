"""A weighted sum of losses, each normalized by its own count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di import protocols
from ditty_di.batch import Batch
from ditty_di.contracts.grammar import Contract, as_contract
from ditty_di.contracts.stages import snake_case
from ditty_di.losses.base import Loss
from ditty_di.losses.plain import as_loss

#: Prefix of the attributes that hold the parts, so that modules among them are registered.
_PART = "part_"


class CompositeLoss(Loss):
    """The weighted sum of losses, each divided by its own global count.

    Args:
        losses: pairs of a loss and its weight. A loss of weight 0 is left out: neither counted nor
            computed nor trained. Parts may be composites.
        name: prefix of its metrics within another composite; None is the class name in snake case.
        contract: what it reads beside what the contracts of its parts say.

    Metrics: `{part}/loss`, unweighted, `{part}/...` of each part's own, and `total`. A part's name
    is its attribute `name`, or its class name in snake case; of equal names the second has `_2`.

    Raises:
        ValueError: no part has a weight above 0, or a weight is negative or not finite.
    """

    contract: Any = None
    parts_argument = "losses"

    def __init__(
        self,
        losses: Sequence[tuple[protocols.Loss, float]],
        *,
        name: str | None = None,
        contract: str | Contract | None = None,
    ) -> None:
        super().__init__()
        self.name = name or snake_case(type(self).__name__)
        self.contract = as_contract(contract if contract is not None else type(self).contract)
        self.weights: dict[str, float] = {}
        built = [(as_loss(loss), weight) for loss, weight in _pairs(losses)]
        for part_name, loss, weight in named_losses(built):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"loss: {part_name} has weight {weight}; write 0 or more")
            if weight:
                setattr(self, _PART + part_name, loss)
                self.weights[part_name] = weight
        if not self.weights:
            raise ValueError("loss: a composite needs a part whose weight is not 0")
        self.num_counts = sum(getattr(part, "num_counts", None) or 1 for _, part in self.parts)

    @classmethod
    def parts_for(cls, *, losses: Any = (), **others: Any) -> list[tuple[str, Any]]:
        """Return the parts by name, of an argument `losses` that may hold nodes not yet built."""
        return [(name, loss) for name, loss, weight in named_losses(losses) if weight]

    @property
    def parts(self) -> list[tuple[str, protocols.Loss]]:
        """The parts that are computed, by unique name."""
        return [(name, getattr(self, _PART + name)) for name in self.weights]

    @property
    def fits(self) -> list[Any]:
        """Rules of the parts about model and layout (`ditty_di.parallelize.fits`)."""
        return [rule for _, part in self.parts for rule in getattr(part, "fits", ())]

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model as all parts need it.

        Args:
            model: as injected.
        """
        for _, part in self.parts:
            model = getattr(part, "prepare_model", lambda model: model)(model)
        return model

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return what each part counts, on the CPU in float64, shape `[parts]`."""
        counts = [part.num_valid(batch).cpu().double().reshape(-1) for _, part in self.parts]
        return torch.cat(counts)

    def forward(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the parts, shape `[]`."""
        total: Any = 0.0
        metrics: dict[str, Tensor] = {}
        for name, part, count in self.counted(num_valid_global):
            loss, own = part(output, batch, count)
            total = total + self.weights[name] * loss
            metrics |= part_metrics(name, loss, own)
        return total, {**metrics, "total": total.detach()}

    def counted(self, num_valid_global: Tensor) -> Iterator[tuple[str, protocols.Loss, Tensor]]:
        """Yield each part's name, loss and own global count, with 1 in place of 0.

        Args:
            num_valid_global: shape `[parts]`.
        """
        counts = torch.where(num_valid_global == 0, 1, num_valid_global)
        first = 0
        for name, part in self.parts:
            size = getattr(part, "num_counts", None)
            yield name, part, counts[first] if size is None else counts[first : first + size]
            first += size or 1

    def of_stage(
        self, batch: Batch, num_valid_global: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the part of a pipeline stage before the last one; None if no part has one.

        Args:
            batch: the micro-batch that the stage ran last.
            num_valid_global: as in `forward`.
        """
        found = [
            (name, own(batch, count))
            for name, part, count in self.counted(num_valid_global)
            if (own := getattr(part, "of_stage", None)) is not None
        ]
        if not found:
            return None
        total = torch.stack([self.weights[name] * loss for name, (loss, _) in found]).sum()
        metrics = {"total": total.detach()}
        for name, (loss, own) in found:
            metrics |= part_metrics(name, loss, own)
        return total, metrics

    def summarize(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the metrics to report, as each part reports its own.

        Args:
            metrics: sums over the optimizer step.
        """
        for name, part in self.parts:
            if (summarize := getattr(part, "summarize", None)) is not None:
                prefix = f"{name}/"
                own = {k: v for k, v in metrics.items() if k.startswith(prefix)}
                found = summarize({k.removeprefix(prefix): v for k, v in own.items()})
                others = {k: v for k, v in metrics.items() if k not in own}
                metrics = others | {prefix + k: v for k, v in found.items()}
        return metrics

    def share(self, batch: Batch, num_valid_global: Tensor) -> Tensor:
        """Return the batch's fraction of the valid elements, averaged over the parts."""
        counted = self.counted(num_valid_global)
        return torch.stack([share(part, batch, count) for _, part, count in counted]).mean()

    def extra_repr(self) -> str:
        """Return the weights."""
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())


def part_metrics(name: str, loss: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a part's loss and metrics under its name.

    Args:
        name: of the part.
        loss: of the part, unweighted.
        own: metrics of the part.
    """
    return {f"{name}/{key}": value.detach() for key, value in {**own, "loss": loss}.items()}


def share(part: protocols.Loss, batch: Batch, num_valid_global: Tensor) -> Tensor:
    """Return the batch's fraction of what a part counts; see `Loss.share`.

    Args:
        part: any loss.
        batch: the batch.
        num_valid_global: what the part counted over the optimizer step.
    """
    own = part.share if isinstance(part, Loss) else Loss.share.__get__(part)
    return own(batch, num_valid_global)  # type: ignore[no-any-return]


def named_losses(losses: Any) -> Iterator[tuple[str, Any, float]]:
    """Yield (unique name, loss, weight) of pairs whose losses may be configuration nodes.

    Args:
        losses: the pairs of a loss and its weight.
    """
    used: set[str] = set()
    for loss, weight in _pairs(losses):
        if isinstance(loss, Mapping):
            name = loss.get("name") or snake_case(str(loss["_target_"]).rpartition(".")[2])
        else:
            name = getattr(loss, "name", None) or snake_case(type(loss).__name__)
        unique, n = str(name), 1
        if "." in unique or "/" in unique:
            raise ValueError(f"loss: {unique!r} cannot name a part; leave out dots and slashes")
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
