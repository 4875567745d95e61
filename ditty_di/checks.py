"""Checks that let a training fail before steps are paid for, or before what is bad is saved."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import nn

from ditty_di.metrics.validation import evaluating
from ditty_di.models.weights import local
from ditty_di.optim import trial

if TYPE_CHECKING:
    from ditty_di.runtime import Runtime

P = ParamSpec("P")

#: When the contracts of a pipeline are verified, beside the static look at them.
CONTRACTS = ("static", "runtime", "every_batch")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def below(*limits: tuple[float, dict[str, Any]]) -> list[str]:
    """Return a complaint for each number below its limit; other values are passed over."""
    return [
        f"{name}={value} must be at least {limit}"
        for limit, values in limits
        for name, value in values.items()
        if is_number(value) and not value >= limit
    ]


def validate(
    *,
    steps: Any = None,
    max_norm: Any = None,
    global_batch_size: Any = None,
    max_skipped_steps: Any = None,
    gc_every: Any = None,
    optimizer: Any = None,
    dataloader: Any = None,
    contracts: Any = "static",
) -> None:
    """Raise ValueError for arguments out of range, an optimizer whose constructor refuses its
    own arguments, and rows per step that are not a multiple of a micro-batch."""
    wrong = below(
        (1, {"steps": steps, "global_batch_size": global_batch_size, "gc_every": gc_every}),
        (0, {"max_skipped_steps": max_skipped_steps}),
    )
    wrong = [f"trainer.{line}" for line in wrong]
    if is_number(max_norm) and not max_norm > 0:
        wrong.append(f"trainer.max_norm={max_norm} must be above 0; inf clips nothing")
    if contracts not in CONTRACTS:
        wrong.append(f"contracts={contracts} is unknown: write {', '.join(CONTRACTS)}")
    wrong += trial.complaints(optimizer, "optimizer.")
    rows: Any = getattr(dataloader, "arguments", {}).get("batch_size")
    numbers = is_number(rows) and is_number(global_batch_size)
    if not wrong and numbers and rows > 0 and global_batch_size % rows:
        wrong.append(
            f"global_batch_size={global_batch_size} is not a multiple of the {rows} rows of a "
            f"micro-batch (the loader's batch_size)"
        )
    if wrong:
        raise ValueError("\n".join(wrong))


def try_first_validation(validator: Any, modules: Iterable[Any]) -> None:
    """Let the validator take its first batch, if it can (`try_first_batch`).

    Args:
        validator: the trainer's, or None.
        modules: what else takes part, put in evaluation mode.

    Raises:
        ValueError: validation data that yields no batch, or whose labels cannot be counted.
    """
    if try_batch := getattr(validator, "try_first_batch", None):
        with evaluating(modules):
            try_batch()


def require_space(checkpointer: Any) -> None:
    """Raise CheckpointError when a checkpointer that can tell has no room for a checkpoint."""
    if require := getattr(checkpointer, "require_space", None):
        require()


def non_finite_parameters(modules: Iterable[Any]) -> str | None:
    """Return which trained parameters of this rank are not finite; None when all are."""
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
    """Raise FloatingPointError, on all ranks: parameters that no training can go on from."""
    problem = non_finite_parameters(modules)
    if runtime.any(problem is not None):
        raise FloatingPointError(
            f"step {step}: {problem or 'parameters of another rank are not finite'}, so it is not "
            f"saved; a lower learning rate may help"
        )


def known_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor name the parameter that a misspelt one may mean, as `task=check` does.

    The signature stays that of `init`. The constructor raises TypeError for unknown arguments.
    """
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs.keys() - known.keys():
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{init.__qualname__}: {name!r} is not a parameter of it{hint}")
        init(*args, **kwargs)

    return checked
