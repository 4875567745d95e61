"""Tensors in the files of a model, read by slices: what is not asked for takes no memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditty_di.models.deferred import Deferred

Index = tuple[slice, ...] | None


class Safetensors:
    """The tensors of several files: safetensors, or those that `torch.save` wrote (`.bin`).

    The files are mapped: what `read` returns is a view of them, whose pages the system drops again
    when memory is short. It has no memory of its own until something is computed from it. Files of
    `torch.save` are read by its restricted unpickler, which makes tensors and nothing else; those
    written before torch 1.6 cannot be mapped and are read whole.

    Raises:
        ValueError: a file that is cut short, or neither of the two kinds.
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

    def deferred(self, name: str) -> Deferred:
        """The tensor, to be moved about before it is read."""
        shape = self.shape(name)
        dtype = self.read(name, tuple(slice(0, 0) for _ in shape)).dtype

        def into(out: Tensor, index: Any) -> None:
            out.copy_(self.read(name, index))

        return Deferred(shape, dtype, into)


class _Pickled:
    """A file of `torch.save` with the methods of safetensors' open files."""

    def __init__(self, file: Path) -> None:
        import zipfile

        mapped = zipfile.is_zipfile(file)
        loaded = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
        self._tensors = {k: _Slice(t) for k, t in loaded.items() if isinstance(t, Tensor)}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_slice(self, name: str) -> _Slice:
        return self._tensors[name]


class _Slice:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]


def _open(file: Path) -> Any:
    import pickle

    from safetensors import SafetensorError, safe_open

    if file.suffix == ".bin":
        try:
            return _Pickled(file)
        except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
            why = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{file} is not a complete file of tensors that torch.save wrote ({why}); copy or "
                f"download it again, or save the model with `save_pretrained`, as safetensors"
            ) from None
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); copy or download it again"
        ) from None
