"""Between the state dicts of live objects and the entries of a checkpoint.

A tensor is an entry of its own, which `torch.distributed.checkpoint` (DCP) shards, deduplicates
and reshards. Anything else (numbers, lists, nested dicts, with the plain tensors inside) is one
pickled entry, which comes back as it was saved, whatever the live object looks like now. Only a
dict that holds a sharded tensor is taken apart. On disk an entry is called `<state>.<key>`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from ditty_di.checkpoint.restricted import Reader, loads

KeyPath = tuple[Any, ...]
Entries = dict[str, Tensor | bytes]


def key_of(path: KeyPath) -> str:
    return ".".join(map(str, path))


def leaves(state_dict: Mapping[Any, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of every entry of a state dict.

    Raises:
        TypeError: a sharded tensor inside a list or tuple, where it could not be resharded.
    """
    for key, value in state_dict.items():
        here = (*path, key)
        if isinstance(value, Tensor) or not _holds_sharded(value):
            yield here, value
        elif isinstance(value, Mapping):
            yield from leaves(value, here)
        else:
            raise TypeError(
                f"{key_of(here)} is a {type(value).__name__} with sharded tensors in "
                f"it; put them into a dict, under names that do not depend on the layout"
            )


def to_save(state_dict: Mapping[Any, Any]) -> Entries:
    """The entries of a state; what is no tensor is pickled now, so that it may change later.

    Raises:
        TypeError: something that cannot be pickled.
        ValueError: two entries of one name.
    """
    entries: Entries = {}
    for path, value in leaves(state_dict):
        key = key_of(path)
        if key in entries:
            raise ValueError(f"two entries are called {key!r}; rename one of its keys")
        entries[key] = value.detach() if isinstance(value, Tensor) else pack(path, value)
    return entries


def pack(path: KeyPath, value: Any) -> bytes:
    try:
        packed = pickle.dumps((path, tree_map_only(Tensor, _plain_copy, value)))
        loads(packed)  # what could not be read again must not be saved
        return packed
    except Exception as error:
        raise TypeError(
            f"{key_of(path)} cannot be saved: {error}; keep functions, locks and the like out of "
            f"state_dict"
        ) from error


def unpack(packed: bytes) -> tuple[KeyPath, Any]:
    return loads(packed)


def insert(state_dict: dict[Any, Any], path: KeyPath, value: Any) -> None:
    """Puts a value in its (possibly nested) place."""
    *outer, last = path
    for key in outer:
        state_dict = state_dict.setdefault(key, {})
    state_dict[last] = value


def staged(entries: Mapping[str, Tensor | bytes]) -> Entries:
    """A copy in host memory, which training cannot change any more."""
    return {k: _staged(v) if isinstance(v, Tensor) else v for k, v in entries.items()}


def saved_entries(checkpoint: Path) -> dict[str, dict[str, Tensor | None]]:
    """What a checkpoint holds, by state and key: a tensor without memory (on meta) for its shape
    and dtype, or None for a pickled entry."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    saved: dict[str, dict[str, Tensor | None]] = {}
    for name, entry in Reader(checkpoint).read_metadata().state_dict_metadata.items():
        state, _, key = name.partition(".")
        saved.setdefault(state, {})[key] = (
            torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            if isinstance(entry, TensorStorageMetadata)
            else None
        )
    return saved


def require_same(
    live: Mapping[str, Any], saved: Mapping[str, Tensor | None], *, hint: str = ""
) -> None:
    """Every live entry must be saved, in the same shape.

    Raises:
        ValueError: naming the first few that are not.
    """
    missing = [key for key in live if key not in saved]
    other = [
        f"{key} ({_shape(there)} there, {_shape(live[key])} here)"
        for key, there in saved.items()
        if key in live and there is not None and there.dim() and _shape(there) != _shape(live[key])
    ]
    problems = []
    if missing:
        problems.append(f"the checkpoint does not have {shown(missing)}")
    if other:
        problems.append(f"it has other shapes of {shown(other)}")
    if problems:
        raise ValueError("; ".join(problems) + hint)


def shown(names: Iterable[str], first: int = 5) -> str:
    """The first few names, and how many there are."""
    names = list(names)
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return ", ".join(names[:first]) + more


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _holds_sharded(value: Any) -> bool:
    return any(isinstance(leaf, DTensor) for leaf in tree_leaves(value))


def _plain_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _staged(tensor: Tensor) -> Tensor:
    # A tensor made of tensors (DTensor, torchao's low-bit optimizer states) is copied part by part:
    # not every such class can be copied as a whole.
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().to("cpu", copy=True)
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    return type(tensor).__tensor_unflatten__(
        {name: _staged(part) if isinstance(part, Tensor) else part for name, part in parts.items()},
        context,
        tensor.size(),
        tensor.stride(),
    )
