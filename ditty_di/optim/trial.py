"""Try an optimizer's own checks of its arguments before there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer


def complaints(optimizer: Any, prefix: str = "", /, **more: Any) -> list[str]:
    """Return the errors that the constructor of an optimizer raises for the arguments of its view
    (`ditty_di.config.View`), given one matrix to optimise: a rate below 0, betas above 1.

    `prefix` stands before the name of the argument that is wrong; `more` are arguments that are
    given later. Empty when the view is of something else, or the constructor needs what is not
    here.
    """
    target = getattr(optimizer, "target", None)
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        return []
    arguments = {
        name: value
        for name, value in {**optimizer.arguments, **more}.items()
        if value is None or isinstance(value, bool | int | float | str | list | tuple)
    }
    error = _raised(target, arguments)
    if error is None:
        return []
    for name, value in arguments.items():
        if _raised(target, {n: v for n, v in arguments.items() if n != name}) is None:
            return [f"{prefix if name not in more else ''}{name}={value}: {error}"]
    return [f"{prefix.rstrip('.') or 'optimizer'}: {error}"]


def _raised(target: type[Optimizer], arguments: Mapping[str, Any]) -> ValueError | None:
    try:
        target([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
    except ValueError as error:
        return error
    except Exception:  # it needs a device, or more than these arguments
        return None
    return None
