"""Disk space: what a checkpoint needs, what there is, and errors that mean there is too little."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ditty_di.checkpoint.folder import CheckpointError

# ENOSPC and EDQUOT, as Python and C++ say them, and EFBIG. torch's writer does not hand on what
# the system said: a file that is shorter than it should be is all that it tells.
_FULL = re.compile(r"\[Errno (28|122)\]|No space left|Disk quota exceeded", re.IGNORECASE)
_CUT_SHORT = re.compile(r"\[Errno 27\]|File too large|unexpected pos|file write failed|inline_cont")


def size_of(values: Iterable[Any], *, first: bool) -> int:
    """Bytes that this rank writes of tensors and pickled entries.

    Args:
        first: whether this rank counts what all ranks hold alike.
    """
    return sum(_size(value, first) for value in values)


def _size(value: Any, first: bool) -> int:
    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if isinstance(value, DTensor):
        copies = 1
        for dim, placement in enumerate(value.placements):
            copies *= value.device_mesh.size(dim) if placement.is_replicate() else 1
        return _size(value._local_tensor, True) // copies
    if not isinstance(value, torch.Tensor):
        return len(value) if first and isinstance(value, bytes) else 0
    if is_traceable_wrapper_subclass(value):  # such as torchao's 8-bit optimizer states
        return sum(_size(getattr(value, name), first) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size() if first else 0


def require(folder: Path, needed: int) -> None:
    """Write a small file in `folder`, remove it, and compare the free space.

    Raises:
        CheckpointError: the folder cannot be written, or has less than `needed` bytes free.
    """
    try:
        probe_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{folder} has too little room: needs about {shown(needed)}, {shown(free)} free"
        )


def probe_folder(folder: Path) -> None:
    """Make the folder, and write and remove a file of a few bytes in it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        with probe.open("wb") as file:
            file.write(b"ditty_di")
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def explained(problem: str, folder: Path, needed: int) -> str | None:
    """Return the message for a save that failed for lack of space; None for other failures."""
    try:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    except OSError:
        return None
    room = f"needs about {shown(needed)}, {shown(free)} free"
    if _FULL.search(problem) or (_CUT_SHORT.search(problem) and free < needed):
        return f"no space left: {room} ({problem})"
    if _CUT_SHORT.search(problem):
        return (
            f"a file was cut short: {room}, so a quota or a limit on the size of files (ulimit -f) "
            f"may be what ends it ({problem})"
        )
    return None


def shown(size: float) -> str:
    """A number of bytes as `12.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
