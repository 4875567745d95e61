"""Convert the state dicts of live objects to the entries of a checkpoint, and back.

A tensor is an entry of its own, which `torch.distributed.checkpoint` (DCP) shards, deduplicates
and reshards. Anything else (numbers, lists, nested dicts, with the plain tensors inside) is one
pickled entry, which comes back as it was saved, whatever the live object looks like now. Only a
dict that holds a sharded tensor is split into its items. On disk an entry is called
`<state>.<key>`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ditty_di.checkpoint.restricted import loads
from ditty_di.messages import first_of

KeyPath = tuple[Any, ...]
Entries = dict[str, Tensor | bytes]


def key_of(path: KeyPath) -> str:
    """Return the name of an entry.

    Args:
        path: the keys that lead to it in the state dict.
    """
    return ".".join(map(str, path))


def leaves(state_dict: Mapping[Any, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield (path, value) for every entry of a state dict.

    Args:
        state_dict: may be nested.
        path: the keys that lead to it.

    Raises:
        TypeError: a sharded tensor inside a list or tuple, where it could not be resharded.
    """
    for key, value in state_dict.items():
        here = (*path, key)
        sharded = any(isinstance(leaf, DTensor) for leaf in tree_leaves(value))
        if isinstance(value, Tensor) or not sharded:
            yield here, value
        elif isinstance(value, Mapping):
            yield from leaves(value, here)
        else:
            raise TypeError(
                f"{key_of(here)} is a {type(value).__name__} with sharded tensors in "
                f"it; put them into a dict, under names that do not depend on the layout"
            )


def to_save(state_dict: Mapping[Any, Any]) -> Entries:
    """Return the entries of a state; all but tensors are pickled now, since they may change.

    Args:
        state_dict: may be nested.

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
    """Pickle a value with its path; `loads` gives both back.

    Args:
        path: the keys that lead to it in the state dict.
        value: tensors in it are copied to the CPU.

    Raises:
        TypeError: it cannot be pickled, or could not be read again.
    """
    try:
        copied = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), value)
        packed = pickle.dumps((path, copied))
        loads(packed)
        return packed
    except Exception as error:
        raise TypeError(
            f"{key_of(path)} cannot be saved: {error}; keep functions, locks and the like out of "
            f"state_dict"
        ) from error


def insert(state_dict: dict[Any, Any], path: KeyPath, value: Any) -> None:
    """Set a value in a nested dict.

    Args:
        state_dict: the dict.
        path: the keys that lead to the value; missing dicts are made.
        value: the value.
    """
    *outer, last = path
    for key in outer:
        state_dict = state_dict.setdefault(key, {})
    state_dict[last] = value


def require_same(
    live: Mapping[str, Any], saved: Mapping[str, Tensor | None], *, hint: str = ""
) -> None:
    """Check that every live entry is saved, in the same shape.

    Args:
        live: the entries of a live state.
        saved: the entries of the checkpoint (see `ditty_di.checkpoint.folder.Checkpoint.entries`).
        hint: the end of the message.

    Raises:
        ValueError: naming the first few that are missing or have another shape.
    """
    missing = [key for key in live if key not in saved]
    reshaped = [
        f"{key} ({_shape(there)} there, {_shape(live[key])} here)"
        for key, there in saved.items()
        if key in live and there is not None and there.dim() and _shape(there) != _shape(live[key])
    ]
    problems = [f"the checkpoint does not have {first_of(missing, 5)}"] if missing else []
    if reshaped:
        problems.append(f"it has other shapes of {first_of(reshaped, 5)}")
    if problems:
        raise ValueError("; ".join(problems) + hint)


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
