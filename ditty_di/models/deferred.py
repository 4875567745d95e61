"""Tensors of files that are moved about before anything is read, then read by slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Index = tuple[slice, ...]


class Deferred:
    """A tensor that is known by its shape and read on demand, as a whole or by slices.

    torch functions that only move elements (`cat`, `stack`, `chunk`, `split`, `transpose` and the
    methods of the same names) give another deferred tensor, of which a slice reads nothing but its
    own elements. Any other function reads its arguments whole and gives an ordinary tensor.

    Args:
        shape: of the whole tensor.
        dtype: of the elements as they are stored.
        into: `into(out, index)` writes the part that the slices of `index`, one for each dimension
            with a start and a stop, say into `out`, casting to its dtype.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        into: Callable[[Tensor, Index], None],
    ) -> None:
        self.shape, self.dtype, self._into = torch.Size(shape), dtype, into

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def copy_into(self, out: Tensor, index: Index | None = None) -> None:
        """Read the part that `index` says (None: all of it) into `out`, piece by piece."""
        given = index or ()
        full = [slice(0, n) for n in self.shape]
        bounds = [s.indices(n) for s, n in zip(given, self.shape, strict=False)]
        part = [slice(start, max(start, stop)) for start, stop, _ in bounds]
        if out.numel():
            self._into(out, (*part, *full[len(part) :]))

    def read(self, index: Index | None = None) -> Tensor:
        """The tensor, or the part that `index` says, in memory of its own."""
        bounds = [s.indices(n) for s, n in zip(index or (), self.shape, strict=False)]
        shape = [max(0, stop - start) for start, stop, _ in bounds]
        out = torch.empty((*shape, *self.shape[len(shape) :]), dtype=self.dtype)
        self.copy_into(out, index)
        return out

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        moves = _MOVES.get(function)
        if moves is not None:
            return moves(*args, **(kwargs or {}))
        return function(*_read(args), **_read(kwargs or {}))

    # -- methods of a tensor that conversions call ------------------------------------------------

    def contiguous(self) -> Deferred:
        return self

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Deferred, ...]:
        return _chunk(self, chunks, dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Deferred, ...]:
        return _split(self, sizes, dim)

    def transpose(self, dim0: int, dim1: int) -> Deferred:
        return _transpose(self, dim0, dim1)

    def squeeze(self, dim: int) -> Deferred:
        return _squeeze(self, dim)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]


def _read(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.read()
    if isinstance(value, dict):
        return {name: _read(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_read(item) for item in value)
    return value


def deferred(value: Tensor | Deferred) -> Deferred:
    """A tensor in memory as one that is read by slices."""
    if isinstance(value, Deferred):
        return value
    whole: Tensor = value
    return Deferred(whole.shape, whole.dtype, lambda out, index: _copy(out, whole[index]))


def _copy(out: Tensor, value: Tensor) -> None:
    out.copy_(value)


def _replaced(index: Index, dim: int, *parts: slice) -> Index:
    return (*index[:dim], *parts, *index[dim + 1 :])


def _cat(tensors: Sequence[Any], dim: int = 0) -> Deferred:
    parts = [deferred(t) for t in tensors]
    dim %= parts[0].ndim
    rest = [_replaced_size(p.shape, dim) for p in parts]
    if any(other != rest[0] for other in rest):
        raise ValueError(f"tensors of the shapes {[list(p.shape) for p in parts]} do not fit")

    def into(out: Tensor, index: Index) -> None:
        wanted, offset = index[dim], 0
        for part in parts:
            start, stop = max(wanted.start, offset), min(wanted.stop, offset + part.shape[dim])
            if start < stop:
                here = out.narrow(dim, start - wanted.start, stop - start)
                part.copy_into(here, _replaced(index, dim, slice(start - offset, stop - offset)))
            offset += part.shape[dim]

    shape = [*parts[0].shape]
    shape[dim] = sum(p.shape[dim] for p in parts)
    return Deferred(shape, parts[0].dtype, into)


def _replaced_size(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _stack(tensors: Sequence[Any], dim: int = 0) -> Deferred:
    parts = [deferred(t) for t in tensors]
    dim %= parts[0].ndim + 1
    return _cat([_unsqueeze(part, dim) for part in parts], dim)


def _unsqueeze(tensor: Deferred, dim: int) -> Deferred:
    def into(out: Tensor, index: Index) -> None:
        tensor.copy_into(out.squeeze(dim), _replaced(index, dim))

    return Deferred((*tensor.shape[:dim], 1, *tensor.shape[dim:]), tensor.dtype, into)


def _squeeze(tensor: Deferred, dim: int) -> Deferred:
    dim %= tensor.ndim
    if tensor.shape[dim] != 1:
        return tensor

    def into(out: Tensor, index: Index) -> None:
        tensor.copy_into(out.unsqueeze(dim), (*index[:dim], slice(0, 1), *index[dim:]))

    return Deferred(_replaced_size(tensor.shape, dim), tensor.dtype, into)


def _narrow(tensor: Deferred, dim: int, start: int, length: int) -> Deferred:
    def into(out: Tensor, index: Index) -> None:
        part = slice(index[dim].start + start, index[dim].stop + start)
        tensor.copy_into(out, _replaced(index, dim, part))

    return Deferred((*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]), tensor.dtype, into)


def _split(tensor: Deferred, sizes: int | Sequence[int], dim: int = 0) -> tuple[Deferred, ...]:
    dim %= tensor.ndim
    rows = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, rows - start) for start in range(0, rows, sizes)]
    if sum(sizes) != rows:
        raise ValueError(f"{rows} in dimension {dim} cannot be split into {list(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(tensor, dim, s, n) for s, n in zip(starts, sizes, strict=True))


def _chunk(tensor: Deferred, chunks: int, dim: int = 0) -> tuple[Deferred, ...]:
    return _split(tensor, max(1, -(-tensor.shape[dim] // chunks)), dim)


def _transpose(tensor: Deferred, dim0: int, dim1: int) -> Deferred:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]

    def into(out: Tensor, index: Index) -> None:
        tensor.copy_into(out.transpose(dim0, dim1), tuple(index[i] for i in order))

    return Deferred([tensor.shape[i] for i in order], tensor.dtype, into)


_MOVES: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.chunk: _chunk,
    torch.split: _split,
    torch.transpose: _transpose,
}
