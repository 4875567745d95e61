"""Tensors in safetensors files, read by slices: what is not asked for takes no memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

Index = tuple[slice, ...] | None


class Safetensors:
    """The tensors of several files.

    The files are mapped: what `read` returns is a view of them, whose pages the system drops again
    when memory is short. It has no memory of its own until something is computed from it.

    Raises:
        ValueError: a file that is cut short, or no safetensors file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        opened = [_open(file) for file in files]
        self._where = {key: file for file in opened for key in file.keys()}  # noqa: SIM118

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str, index: Index = None) -> Tensor:
        """The tensor, or the part of it that `index` says."""
        source = self._where[name].get_slice(name)
        return source[index] if index else source[...]


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}); copy or download it again"
        ) from None
