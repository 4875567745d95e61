"""Digests of a dataset's content, to detect rows that were replaced in place."""

from __future__ import annotations

import hashlib
import pickle
import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ditty_di.data.cache import fingerprint
from ditty_di.seed import preserved_rng

_SECONDS = 1.0  # of reading rows
_TWICE = 8  # rows that are read twice, to detect random ones

_OTHER_CONTENT = """\
the training data have another content than when the checkpoint was saved, though the number of \
rows is the same: give it the data that it began with; load.content=false goes on at the same \
position of the changed data, load.data=false load.content=false begins them anew"""


def rows_digest(dataset: Any, sampled: int | None = None) -> tuple[int, str] | None:
    """Return the number of rows read of a map-style dataset, and their SHA-256.

    Rows are read with fixed seeds, evenly spread over the dataset; the global generators are
    preserved.

    Args:
        dataset: The dataset.
        sampled: Number of rows to read; None reads as many as a second allows, up to all.

    Returns:
        None for rows that cannot be read, or that differ when they are read again.
    """
    read, deadline = 0, time.monotonic() + _SECONDS
    try:
        with preserved_rng():
            rows = len(dataset)
            digest = hashlib.sha256(str(rows).encode())
            # Spread over the whole first, then ever finer: any number of rows is a sample.
            while read < min(rows, rows if sampled is None else sampled):
                if sampled is None and time.monotonic() > deadline:
                    break
                row = _row(dataset, index := _spread(read, rows))
                if read < _TWICE and row != _row(dataset, index):
                    return None
                digest.update(row)
                read += 1
            return read, digest.hexdigest()
    except Exception:  # training reports what is wrong with the rows
        return None


def _spread(n: int, rows: int) -> int:
    """Return the n-th row of a sequence that visits every row once, evenly spread."""
    step = max(1, int(rows * 0.6180339887))
    while np.gcd(step, rows) != 1:
        step += 1
    return (rows - 1 + n * step) % rows


def digest_of(value: Any) -> bytes:
    """Return the SHA-256 of nested tensors, arrays, mappings, lists and plain values."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.digest()


def _row(dataset: Any, index: int) -> bytes:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # of the CPU alone
    return digest_of(dataset[index])


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        _feed(digest, f"{value.dtype} {tuple(value.shape)}")
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
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
    """Return the SHA-256 of an array, or of evenly spread blocks of a large one.

    Args:
        array: The array.
        block: Size of a block, in bytes.
        blocks: Number of blocks that are read of a larger array.
    """
    flat = array.reshape(-1).view(np.uint8)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    starts: Any = range(0, flat.nbytes, block)
    if flat.nbytes > block * blocks:
        starts = np.linspace(0, flat.nbytes - block, blocks, dtype=np.int64)
    for start in starts:
        digest.update(flat[start : start + block].data)
    return digest.hexdigest()


def own_digest(dataset: Any) -> str | None:
    """Return what the dataset's `fingerprint()` returns; None if it has none."""
    own = getattr(dataset, "fingerprint", None)
    digest = own() if callable(own) else None
    return None if digest is None else str(digest)


def fingerprint_with(dataset: Any, *parts: str | bytes) -> str | None:
    """Return a digest of a dataset's fingerprint and `parts`; None if it has no fingerprint."""
    digest = own_digest(dataset)
    return None if digest is None else fingerprint(digest, *parts)


class DataContent:
    """The content of a loader's dataset, as a state of a checkpoint.

    It is the dataset's own `fingerprint()`, or the `rows_digest` of its rows. A loader without a
    `dataset`, a dataset with random rows and a checkpoint of an earlier version are not compared.

    Args:
        dataloader: The loader, whose `dataset` is read.
    """

    def __init__(self, dataloader: Any) -> None:
        self._dataset = getattr(dataloader, "dataset", None)
        self._known: dict[str, Any] | None = None
        self._saved = True

    def state_dict(self) -> dict[str, Any]:
        """Return the content's digest."""
        if not self._saved:
            return {}
        if self._known is None:
            self._known = self._measure()
        return {"content": self._known}

    def prepare_load(self, saved: Mapping[str, Any]) -> None:
        """Note whether the checkpoint has a digest; those of an earlier version have none."""
        self._saved = "content" in saved
        self._known = {}  # overwritten by what is loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the checkpoint's digest.

        Raises:
            ValueError: The rows differ from those of the checkpoint.
        """
        self._saved, self._known = True, None
        saved = state_dict.get("content") or {}
        if not saved:
            return
        rows = saved.get("rows")
        here = self._measure_rows(rows) if rows else self._measure()
        alike = ("rows" in saved) == ("rows" in here)  # else one is not a digest of rows
        self._known = here if alike else None
        if alike and here.get("digest") and saved.get("digest") != here["digest"]:
            raise ValueError(_OTHER_CONTENT)

    def _measure(self) -> dict[str, Any]:
        digest = own_digest(self._dataset)
        return self._measure_rows(None) if digest is None else {"digest": digest}

    def _measure_rows(self, rows: int | None) -> dict[str, Any]:
        found = None if self._dataset is None else rows_digest(self._dataset, rows)
        return {} if found is None else {"rows": found[0], "digest": found[1]}
