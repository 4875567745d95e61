"""Try an optimizer's own checks of its arguments before there is a model."""

from __future__ import annotations

import math
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
    target = getattr(optimizer, "target", None)
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        return []
    make: Any = target

    def raised(**arguments: Any) -> ValueError | None:
        try:
            make([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
        except ValueError as error:
            return error
        except Exception:  # it needs a device, or more than these arguments
            return None
        return None

    plain = bool | int | float | str | list | tuple | None
    given = {**optimizer.arguments, **more}
    arguments = {name: value for name, value in given.items() if isinstance(value, plain)}
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
