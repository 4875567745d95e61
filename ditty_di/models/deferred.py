"""Tensors of files that are rearranged by shape only, and read by slices afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Index = tuple[slice, ...]


class Deferred:
    """A tensor whose shape is known and whose elements are read on demand, whole or by slices.

    torch functions that only move elements (`cat`, `stack`, `chunk`, `split`, `transpose`, and the
    methods of the same names) return another deferred tensor; reading a slice of it reads nothing
    but its own elements. Any other function reads its arguments whole.

    Args:
        shape: of the whole tensor.
        dtype: of the stored elements.
        into: `into(out, index)` writes the part given by `index` (one slice a dimension, with
            start and stop) into `out`, cast to its dtype.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, into: Callable[[Tensor, Index], None]
    ) -> None:
        self.shape, self.dtype, self._into = torch.Size(shape), dtype, into
        self.ndim = len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def copy_into(self, out: Tensor, index: Index | None = None) -> None:
        """Read the part given by `index` (None: all of it) into `out`."""
        if out.numel():
            self._into(out, self._bounds(index))

    def read(self, index: Index | None = None) -> Tensor:
        """Return the tensor, or the part given by `index`, in newly allocated memory."""
        bounds = self._bounds(index)
        out = torch.empty([part.stop - part.start for part in bounds], dtype=self.dtype)
        self.copy_into(out, bounds)
        return out

    def _bounds(self, index: Index | None) -> Index:
        """Return one slice a dimension, with start and stop in range."""
        given = (*(index or ()), *[slice(None)] * self.ndim)
        bounds = (part.indices(size) for part, size in zip(given, self.shape, strict=False))
        return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        moved = _MOVES.get(function)
        if moved is not None:
            return moved(*args, **(kwargs or {}))
        return function(*tree_map(_read, args), **tree_map(_read, kwargs or {}))

    # -- methods of a tensor that conversions call ------------------------------------------------

    def contiguous(self) -> Deferred:
        """Return itself."""
        return self

    def narrow(self, dim: int, start: int, length: int) -> Deferred:
        """Return `length` entries of a dimension from `start` on."""

        def into(out: Tensor, index: Index) -> None:
            part = slice(index[dim].start + start, index[dim].stop + start)
            self.copy_into(out, _with(index, dim, part))

        return Deferred(_with(self.shape, dim, length), self.dtype, into)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Deferred, ...]:
        """Split a dimension as `torch.split` does."""
        dim %= self.ndim
        rows = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, rows - start) for start in range(0, rows, sizes)]
        if sum(sizes) != rows:
            raise ValueError(f"{rows} in dimension {dim} cannot be split into {list(sizes)}")
        starts = (sum(sizes[:i]) for i in range(len(sizes)))
        return tuple(self.narrow(dim, s, n) for s, n in zip(starts, sizes, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Deferred, ...]:
        """Split a dimension as `torch.chunk` does."""
        return self.split(max(1, -(-self.shape[dim] // chunks)), dim)

    def transpose(self, dim0: int, dim1: int) -> Deferred:
        """Swap two dimensions."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]

        def into(out: Tensor, index: Index) -> None:
            self.copy_into(out.transpose(dim0, dim1), tuple(index[i] for i in order))

        return Deferred([self.shape[i] for i in order], self.dtype, into)

    def unsqueeze(self, dim: int) -> Deferred:
        """Add a dimension of size 1."""

        def into(out: Tensor, index: Index) -> None:
            self.copy_into(out.squeeze(dim), _with(index, dim))

        return Deferred((*self.shape[:dim], 1, *self.shape[dim:]), self.dtype, into)

    def squeeze(self, dim: int) -> Deferred:
        """Remove a dimension of size 1."""
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self

        def into(out: Tensor, index: Index) -> None:
            self.copy_into(out.unsqueeze(dim), (*index[:dim], slice(0, 1), *index[dim:]))

        return Deferred(_with(self.shape, dim), self.dtype, into)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]


def deferred(value: Tensor | Deferred) -> Deferred:
    """Return a tensor in memory as one that is read by slices."""
    if isinstance(value, Deferred):
        return value
    whole: Tensor = value

    def into(out: Tensor, index: Index) -> None:
        out.copy_(whole[index])

    return Deferred(whole.shape, whole.dtype, into)


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Deferred) else value


def _with(values: Sequence[Any], dim: int, *instead: Any) -> tuple[Any, ...]:
    """Return the values with that of one dimension replaced by none or more."""
    return (*values[:dim], *instead, *values[dim + 1 :])


def _cat(tensors: Sequence[Any], dim: int = 0) -> Deferred:
    parts = [deferred(t) for t in tensors]
    dim %= parts[0].ndim
    if len({_with(part.shape, dim) for part in parts}) > 1:
        raise ValueError(f"tensors of the shapes {[list(p.shape) for p in parts]} do not fit")

    def into(out: Tensor, index: Index) -> None:
        wanted, offset = index[dim], 0
        for part in parts:
            start, stop = max(wanted.start, offset), min(wanted.stop, offset + part.shape[dim])
            if start < stop:
                here = out.narrow(dim, start - wanted.start, stop - start)
                part.copy_into(here, _with(index, dim, slice(start - offset, stop - offset)))
            offset += part.shape[dim]

    shape = _with(parts[0].shape, dim, sum(p.shape[dim] for p in parts))
    return Deferred(shape, parts[0].dtype, into)


def _stack(tensors: Sequence[Any], dim: int = 0) -> Deferred:
    parts = [deferred(t) for t in tensors]
    dim %= parts[0].ndim + 1
    return _cat([part.unsqueeze(dim) for part in parts], dim)


_MOVES: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.chunk: Deferred.chunk,
    torch.split: Deferred.split,
    torch.transpose: Deferred.transpose,
}
