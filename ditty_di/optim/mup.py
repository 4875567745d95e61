"""Learning rates by width, as muP has them (`ditty_di.models.mup`)."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ditty_di.fqn import canonical_fqn
from ditty_di.messages import first_of
from ditty_di.models.mup import scales
from ditty_di.optim import trial
from ditty_di.optim.groups import NamedParameters, grouped
from ditty_di.protocols import early_checks

log = logging.getLogger(__name__)

_NOT_ADAM = """\
optimizer: {name} updates by the size of a gradient, and muP's learning rates are for optimizers \
that divide it by its own size; write torch.optim.AdamW, Adam, or another like them"""


def _validate(*, optimizer: Any = None, groups: Any = None, lr: Any = None) -> None:
    grouped.validate(optimizer=optimizer, lr=lr)  # type: ignore[attr-defined]
    if (make := trial.factory(optimizer)) and not trial.is_normalized(make):
        raise ValueError(_NOT_ADAM.format(name=optimizer.target.__name__))


def _rehearse(build: Callable[[str], Any]) -> list[str]:
    scales(build("model"))
    return []


@early_checks(validate=_validate, rehearse=_rehearse)
def by_width(
    named_parameters: NamedParameters,
    /,
    *,
    model: nn.Module,
    optimizer: Callable[..., Optimizer],
    groups: Sequence[Mapping[str, Any]] = (),
    lr: float | None = None,
) -> Optimizer:
    """Build one optimizer whose learning rates fall with the width of what feeds a matrix.

    The rate of a parameter is the optimizer's times `Scale.lr` (arXiv 2203.03466, table 8, Adam),
    and its weight decay divided by it, so that their product does not depend on the width, as in
    the paper's library (github.com/microsoft/mup).

    Args:
        named_parameters: (name, parameter) of all that is trained. Those outside the model, such
            as a loss's, keep their rate.
        model: the one that is trained, or as it was on meta; its configuration has the base.
        optimizer: a partial of an optimizer whose update does not depend on the size of a gradient.
        groups: conditions and options, as for `ditty_di.optim.grouped`; a rate in them is scaled.
        lr: the learning rate found on the base; None keeps the partial's own.

    Raises:
        ValueError: an optimizer whose update depends on the size of a gradient, such as SGD; a
            model without a base, or parameters that the base does not have, such as an adapter's.
    """
    if not trial.is_normalized(optimizer):
        name = getattr(getattr(optimizer, "func", optimizer), "__name__", optimizer)
        raise ValueError(_NOT_ADAM.format(name=name))
    named = list(named_parameters)
    factors = {name: scale.lr for name, scale in scales(model).items()}
    inside = {canonical_fqn(name) for name, _ in model.named_parameters()}
    if unknown := [name for name, _ in named if name in inside - factors.keys()]:
        raise ValueError(
            f"optimizer: the base of muP has no {first_of(unknown)}; train the whole model without "
            f"adapters, or use optimizer=adamw"
        )
    built = grouped(named, optimizer=optimizer, groups=groups, lr=lr)
    _split(built, {id(p): factors.get(name, 1.0) for name, p in named})
    found = Counter(factors.get(name, 1.0) for name, _ in named)
    log.info(
        "muP: learning rates times %s",
        ", ".join(f"{factor:g} ({n} parameters)" for factor, n in sorted(found.items())),
    )
    return built


def _split(optimizer: Optimizer, factors: dict[int, float]) -> None:
    """Split every group by the factors of its parameters' rates; the largest rates come first."""
    whole = list(optimizer.param_groups)
    parts = []
    for group in whole:
        members = defaultdict(list)
        for n, parameter in enumerate(group["params"]):
            members[factors[id(parameter)]].append(n)
        for factor, chosen in members.items():
            part = {**group, "lr": group["lr"] * factor}
            for key in {"params", "param_names"} & group.keys():
                part[key] = [group[key][n] for n in chosen]
            if "weight_decay" in group:
                part["weight_decay"] = group["weight_decay"] / factor
            parts.append((factor, part))
    parts.sort(key=lambda pair: -pair[0])
    optimizer.param_groups[:] = [part for _, part in parts]
