"""The content of a dataset as a digest, to notice rows that were replaced in place."""

from __future__ import annotations

import hashlib
import pickle
import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ditty_di.data.cache import fingerprint
from ditty_di.data.row_seeds import preserved_generators

_SECONDS = 1.0
_TWICE = 8


def rows_digest(dataset: Any, sampled: int | None = None) -> tuple[int, str] | None:
    """(number of rows read, their SHA-256) of a map-style dataset; None if it cannot be told.

    Rows are read with fixed seeds, evenly spread over the dataset, and random numbers are left as
    they were. A row that is another one when it is read again has no digest.

    Args:
        sampled: how many rows to read; None reads as many as a second allows, up to all.
    """
    try:
        with preserved_generators():
            return _rows_digest(dataset, sampled)
    except Exception:  # not to be read here; training will say what is wrong with it
        return None


def _rows_digest(dataset: Any, sampled: int | None) -> tuple[int, str] | None:
    rows = len(dataset)
    digest = hashlib.sha256(str(rows).encode())
    deadline, read = time.monotonic() + _SECONDS, 0
    # Spread first over the whole, then ever finer: any number of rows is a sample.
    while read < (rows if sampled is None else min(sampled, rows)):
        if sampled is None and time.monotonic() > deadline:
            break
        row = _row(dataset, index := _spread(read, rows))
        if read < _TWICE and row != _row(dataset, index):
            return None
        digest.update(row)
        read += 1
    return read, digest.hexdigest()


def _spread(n: int, rows: int) -> int:
    """The n-th row of a sequence that visits every row once, evenly spread from the beginning."""
    step = max(1, int(rows * 0.6180339887))
    while np.gcd(step, rows) != 1:
        step += 1
    return (rows - 1 + n * step) % rows


def _row(dataset: Any, index: int) -> bytes:
    random.seed(0)
    np.random.seed(0)
    _torch().default_generator.manual_seed(0)  # the CPU's alone
    digest = hashlib.sha256()
    _feed(digest, dataset[index])
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, _torch().Tensor):
        value = value.detach().cpu().contiguous()
        _feed(digest, f"{value.dtype} {tuple(value.shape)}")
        digest.update(value.reshape(-1).view(_torch().uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _feed(digest, f"{value.dtype} {value.shape}")
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            _feed(digest, repr(key))
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        _feed(digest, f"{len(value)} values")
        for item in value:
            _feed(digest, item)
    elif isinstance(value, str | bytes | int | float | complex | None):
        text = repr(value).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    else:
        digest.update(pickle.dumps(value))


def array_digest(array: np.ndarray, block: int = 1 << 20, blocks: int = 1024) -> str:
    """SHA-256 of an array; of one above a GiB, of 1024 blocks of a MiB that are spread over it."""
    flat = array.reshape(-1).view(np.uint8)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    if flat.nbytes <= block * blocks:
        for start in range(0, flat.nbytes, block):
            digest.update(flat[start : start + block].data)
    else:
        for start in np.linspace(0, flat.nbytes - block, blocks, dtype=np.int64):
            digest.update(flat[start : start + block].data)
    return digest.hexdigest()


def _torch() -> Any:
    import torch

    return torch


def fingerprint_with(rows: Any, *parts: str | bytes) -> str | None:
    """Return the fingerprint of what is made of `rows` with `parts`; None if they have none."""
    own = getattr(rows, "fingerprint", None)
    digest = own() if callable(own) else None
    return None if digest is None else fingerprint(str(digest), *parts)


class DataContent:
    """The content of a loader's dataset, as a state of a checkpoint; another one is refused.

    A dataset's own `fingerprint()` is taken; where there is none, or it is None, `rows_digest` of
    its rows. A loader without a `dataset`, a dataset whose rows are random, and a checkpoint of an
    earlier version say nothing.
    """

    def __init__(self, dataloader: Any) -> None:
        self._dataset = getattr(dataloader, "dataset", None)
        self._known: dict[str, Any] | None = None
        self._noted = True

    def state_dict(self) -> dict[str, Any]:
        if not self._noted:
            return {}
        if self._known is None:
            self._known = self._measure(None)
        return {"content": self._known}

    def prepare_load(self, saved: Mapping[str, Any]) -> None:
        """A checkpoint of an earlier version has no content."""
        self._noted = "content" in saved
        self._known = {}  # what is loaded takes its place

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the rows are others than those of the checkpoint."""
        self._noted, self._known = True, None
        saved = state_dict.get("content") or {}
        if not saved:
            return
        rows = saved.get("rows")
        here = self._measured_rows(rows) if rows else self._measure(None)
        alike = ("rows" in saved) == ("rows" in here)  # an earlier version may have read other rows
        self._known = here if alike else None
        if alike and here.get("digest") and saved.get("digest") != here["digest"]:
            raise ValueError(
                "the training data have another content than when the checkpoint was saved, though "
                "the number of rows is the same: give it the data that it began with; "
                "load.content=false goes on at the same position of the changed data, "
                "load.data=false load.content=false begins them anew"
            )

    def _measure(self, rows: int | None) -> dict[str, Any]:
        own = getattr(self._dataset, "fingerprint", None)
        if callable(own) and (digest := own()) is not None:
            return {"digest": str(digest)}
        return self._measured_rows(rows)

    def _measured_rows(self, rows: int | None) -> dict[str, Any]:
        found = None if self._dataset is None else rows_digest(self._dataset, rows)
        return {} if found is None else {"rows": found[0], "digest": found[1]}
