"""Torch dtypes by name."""

from __future__ import annotations

import torch


def dtype_by_name(name: str, argument: str = "dtype") -> torch.dtype:
    """Return the torch dtype called `name`.

    Args:
        name: such as `float32` or `bfloat16`.
        argument: the argument that holds the name, for the error message.

    Raises:
        ValueError: torch has no dtype of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{argument}={name}: not a dtype; write float32, bfloat16 or float16")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")
