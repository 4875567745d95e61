"""Disk space: what a checkpoint needs, what is free, and errors that mean there is too little."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ditty_di.checkpoint.manifest import CheckpointError
from ditty_di.io import fsync
from ditty_di.messages import readable

# ENOSPC and EDQUOT, as Python and C++ spell them, and EFBIG. torch's writer does not pass on the
# system's message: it only reports a file that is shorter than it should be.
_FULL = re.compile(r"\[Errno (28|122)\]|No space left|Disk quota exceeded", re.IGNORECASE)
_CUT_SHORT = re.compile(r"\[Errno 27\]|File too large|unexpected pos|file write failed|inline_cont")


def size_of(value: Any, *, first: bool) -> int:
    """Return the bytes that this rank writes of a tensor or pickled entry.

    Args:
        value: the entry.
        first: whether this rank writes what all ranks hold alike.
    """
    if isinstance(value, DTensor):
        copies = 1
        for dim, placement in enumerate(value.placements):
            copies *= value.device_mesh.size(dim) if placement.is_replicate() else 1
        return size_of(value._local_tensor, first=True) // copies
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        # such as torchao's 8-bit optimizer states
        parts = (getattr(value, name) for name in value.__tensor_flatten__()[0])
        return sum(size_of(part, first=first) for part in parts)
    if not first:
        return 0
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return len(value) if isinstance(value, bytes) else 0


def require(folder: Path, needed: int) -> None:
    """Write and remove a small file in a folder, and check its free space.

    Args:
        folder: made if it does not exist.
        needed: bytes.

    Raises:
        CheckpointError: the folder cannot be written, or has less than `needed` bytes free.
    """
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"ditty_di")
            fsync(probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{folder} has too little room: needs about {readable(needed)}, {readable(free)} free"
        )


def explained(problem: str, folder: Path, needed: int) -> str | None:
    """Return the message for a save that failed for lack of space; None for other failures.

    Args:
        problem: message of the failed save.
        folder: the folder of checkpoints.
        needed: bytes of the checkpoint.
    """
    try:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    except OSError:
        return None
    room = f"needs about {readable(needed)}, {readable(free)} free"
    if _FULL.search(problem) or (_CUT_SHORT.search(problem) and free < needed):
        return f"no space left: {room} ({problem})"
    if _CUT_SHORT.search(problem):
        return (
            f"a file was cut short: {room}, so a quota or a limit on the size of files (ulimit -f) "
            f"may be what ends it ({problem})"
        )
    return None
