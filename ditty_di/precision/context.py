"""A context manager around every forward pass of a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


def forward_within(
    model: nn.Module, context: Callable[[nn.Module], AbstractContextManager[Any]]
) -> nn.Module:
    """Enter `context(model)` before each forward pass of the model and leave it after.

    By hooks, so that it does not matter what else replaces the forward, and the class stays.
    """
    entered: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(context(module))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if entered:  # not when an earlier hook failed
            entered.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    return model
