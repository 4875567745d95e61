"""Stand-ins for modules that other pipeline stages of a model have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Skipped(nn.Module):
    """Return the first argument, in place of a module that another pipeline stage has.

    The other modules keep the names and the numbers that they have in the whole model.

    Args:
        values: the first argument is returned as the first of a tuple of so many values, as some
            models' blocks do, the others None; 0 returns it alone.
    """

    def __init__(self, values: int = 0) -> None:
        super().__init__()
        self.values = values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return self.wrapped(first_argument(args, kwargs))

    def wrapped(self, value: Any) -> Any:
        """Return a value in the form of the module's output."""
        return (value, *[None] * (self.values - 1)) if self.values else value

    def like(self, module: nn.Module) -> Skipped:
        """Take over the settings of the module: models choose masks by them. Return `self`.

        Args:
            module: its attributes that are numbers or text are set, unless `self` has them.
        """
        for name, value in vars(module).items():
            if isinstance(value, str | int | float) and name not in vars(self):
                setattr(self, name, value)
        return self


class SkippedTable(Skipped):
    """Return 0 in place of an embedding, which another stage has added already."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return 0, shape `[]`, on the device of the first argument."""
        return torch.zeros((), device=getattr(first_argument(args, kwargs), "device", None))


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call, given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def skipped_paths(model: nn.Module) -> list[str]:
    """Return the paths of the modules that other stages have; empty for a whole model."""
    return [path for path, module in model.named_modules() if isinstance(module, Skipped)]
