"""Read tensors in the files of a model by slices: only what is read takes memory."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditty_di.models.deferred import Deferred

Index = tuple[slice, ...] | None


class Safetensors:
    """The tensors of several files: safetensors, or written by `torch.save` (`.bin`).

    The files are memory-mapped: `read` returns a view of them, whose pages the system drops again
    when memory is short. Files of `torch.save` are read by its restricted unpickler, which makes
    tensors and nothing else; those written before torch 1.6 cannot be mapped and are read whole.

    Args:
        files: paths; one with the suffix `.bin` was written by `torch.save`.

    Raises:
        ValueError: a file that is incomplete, or of neither kind.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        opened = [_load(file) if file.suffix == ".bin" else _open(file) for file in files]
        self._where = {key: file for file in opened for key in file.keys()}  # noqa: SIM118

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        source = self._source(name)
        return tuple(source.shape if isinstance(source, Tensor) else source.get_shape())

    def read(self, name: str, index: Index = None) -> Tensor:
        """Return a tensor, or the part of it given by `index`, as a view of the file."""
        source = self._source(name)
        return source[index] if index else source[...]

    def deferred(self, name: str) -> Deferred:
        """Return a tensor that can be rearranged before it is read."""
        shape = self.shape(name)
        dtype = self.read(name, tuple(slice(0, 0) for _ in shape)).dtype

        def into(out: Tensor, index: Any) -> None:
            out.copy_(self.read(name, index))

        return Deferred(shape, dtype, into)

    def _source(self, name: str) -> Any:
        """Return a tensor, or the slice of a safetensors file."""
        file = self._where[name]
        return file[name] if isinstance(file, dict) else file.get_slice(name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); copy or download it again"
        ) from None


def _load(file: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(file)
        loaded = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
        return {name: t for name, t in loaded.items() if isinstance(t, Tensor)}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file} is not a complete file of tensors that torch.save wrote ({why}); copy or "
            f"download it again, or save the model with `save_pretrained`, as safetensors"
        ) from None
