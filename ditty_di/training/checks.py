"""Checks of the trainer's arguments, and of what can fail before the first step."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, ParamSpec

from torch import nn

from ditty_di import isolation
from ditty_di.messages import first_of, refuse
from ditty_di.models.evaluation import evaluating
from ditty_di.optim import trial
from ditty_di.parallelize.fits import Degrees, Parts, fits

P = ParamSpec("P")
log = logging.getLogger(__name__)

#: Values of the trainer's argument `contracts`.
CONTRACTS = ("static", "runtime", "every_batch")


def validate(
    *,
    max_steps: Any = None,
    max_grad_norm: Any = None,
    global_batch_size: Any = None,
    max_skipped_steps: Any = None,
    gc_interval: Any = None,
    optimizer: Any = None,
    dataloader: Any = None,
    contracts: Any = "static",
) -> None:
    """Check arguments that are known before anything is built; those of `Trainer`.

    Raises:
        ValueError: arguments out of range, an optimizer whose constructor rejects its own
            arguments, or rows per step that are not a multiple of a micro-batch.
    """
    limits = {
        "max_steps": (max_steps, 1),
        "global_batch_size": (global_batch_size, 1),
        "gc_interval": (gc_interval, 1),
        "max_skipped_steps": (max_skipped_steps, 0),
    }
    wrong = [
        f"trainer.{name}={value} must be at least {limit}"
        for name, (value, limit) in limits.items()
        if _is_number(value) and not value >= limit
    ]
    if _is_number(max_grad_norm) and not max_grad_norm > 0:
        wrong.append(f"trainer.max_grad_norm={max_grad_norm} must be above 0; inf does not clip")
    if contracts not in CONTRACTS:
        wrong.append(f"contracts={contracts} is unknown: write {', '.join(CONTRACTS)}")
    wrong += trial.complaints(optimizer, "optimizer.")
    rows: Any = getattr(dataloader, "arguments", {}).get("micro_batch_size")
    numbers = _is_number(rows) and _is_number(global_batch_size)
    if not wrong and numbers and rows > 0 and global_batch_size % rows:
        wrong.append(
            f"global_batch_size={global_batch_size} is not a multiple of the {rows} rows of a "
            f"micro-batch (the loader's micro_batch_size)"
        )
    refuse(wrong)


def rehearse(build: Callable[[str], Any]) -> list[str]:
    """Try early whether the model fits the layout, and what `ditty_di.isolation.rehearse` tries.

    Args:
        build: as in `ditty_di.protocols`.

    Returns:
        Warnings.

    Raises:
        ValueError: the model does not fit the degrees of the runtime, or cannot keep the documents
            of a row apart.
    """
    names = [field.name for field in fields(Degrees)]
    given = {name: build(f"runtime.{name}") for name in names}
    degrees = Degrees(**{name: n for name, n in given.items() if isinstance(n, int)})
    loss_fn = build("loss_fn")
    if degrees.split_the_model or getattr(loss_fn, "fits", None):
        slots = {name: build(name) for name in ("parallelize_fn", "pipeline_fn")}
        slots["collate_fn"] = build("dataloader.collate_fn")
        refuse(fits(Parts(build("model"), loss_fn, **slots), degrees))
    return isolation.rehearse(build)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def try_first_validation(validator: Any, modules: Iterable[Any]) -> None:
    """Call the validator's `try_first_batch`, if it has one.

    Args:
        validator: the trainer's, or None.
        modules: other modules that take part; they are set to evaluation mode.

    Raises:
        ValueError: validation data that yields no batch, or whose labels cannot be counted.
    """
    if try_batch := getattr(validator, "try_first_batch", None):
        with evaluating(modules):
            try_batch()


def warn_without_gradient(modules: Iterable[nn.Module]) -> None:
    """Log the trainable parameters that no gradient has reached, such as adapters never called.

    Args:
        modules: the model's parts, after a backward pass.
    """
    named = (named for module in modules for named in module.named_parameters())
    untrained = [name for name, p in named if p.requires_grad and p.grad is None]
    if untrained:
        log.warning(
            "no gradient has reached %d trainable parameters in the first step: %s; freeze them, "
            "or leave their layers out of the adapter",
            *(len(untrained), first_of(untrained, 4)),
        )


def known_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Make a constructor suggest a parameter for a misspelled argument, as `task=check` does.

    Args:
        init: the constructor; its signature is kept.

    Returns:
        A constructor that raises TypeError for unknown arguments.
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
