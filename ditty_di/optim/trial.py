"""Try an optimizer's checks of its arguments, and its kind of update, before there is a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer


def complaints(optimizer: Any, prefix: str = "", /, **more: Any) -> list[str]:
    """Return the errors that an optimizer's constructor raises for the arguments of its view.

    The optimizer is given one matrix to optimize, which finds a rate below 0 or betas above 1.

    Args:
        optimizer: a view (`ditty_di.config.View`) of an optimizer class.
        prefix: written before the name of the argument that is wrong.
        **more: arguments that are given later.

    Returns:
        Messages; empty when the view is of something else, or the constructor needs more.
    """
    if (make := _class(optimizer)) is None:
        return []

    def raised(**arguments: Any) -> ValueError | None:
        try:
            make([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
        except ValueError as error:
            return error
        except Exception:  # it needs a device, or more than these arguments
            return None
        return None

    arguments = _plain({**optimizer.arguments, **more})
    lr = arguments.get("lr")
    if isinstance(lr, float) and not math.isfinite(lr):
        return [f"{prefix if 'lr' not in more else ''}lr={lr}: write a finite learning rate"]
    error = raised(**arguments)
    if error is None:
        return []
    for name, value in arguments.items():
        if raised(**{n: v for n, v in arguments.items() if n != name}) is None:
            return [f"{prefix if name not in more else ''}{name}={value}: {error}"]
    return [f"{prefix.rstrip('.') or 'optimizer'}: {error}"]


def factory(optimizer: Any) -> Callable[..., Optimizer] | None:
    """Return a factory with the arguments of a view; None for a view of no optimizer class."""
    make = _class(optimizer)
    return None if make is None else partial(make, **_plain(optimizer.arguments))


def is_normalized(make: Callable[..., Optimizer]) -> bool:
    """Return whether the first update of every element is the same, whatever its gradient.

    So it is for Adam and its like, which divide a gradient by its own size. One matrix is updated.
    An optimizer that cannot be tried (it needs a GPU, or more arguments) counts as one of them.

    Args:
        make: called with a list of one (name, parameter).
    """
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    matrix.grad = torch.tensor([[1e-2, -1.0], [1e2, 1e1]])
    try:
        with torch.compiler.set_stance("force_eager"):  # torchao's compile their step
            make([("weight", matrix)]).step()
        sizes = matrix.detach().abs()
        return bool(torch.allclose(sizes, sizes.mean().expand_as(sizes), rtol=1e-3))
    except Exception:  # or its tensors have no values, as in a plan
        return True


def _class(optimizer: Any) -> Any:
    """Return the optimizer class of a view, or None."""
    target = getattr(optimizer, "target", None)
    return target if isinstance(target, type) and issubclass(target, Optimizer) else None


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = bool | int | float | str | list | tuple | None
    return {name: value for name, value in arguments.items() if isinstance(value, plain)}
