"""Write files so that neither a reader nor a crash finds half of one, and on one rank only."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end of the block.

    When the block raises, the temporary file is removed and `path` is left as it was.

    Args:
        path: the file to replace.
    """
    # Not by the process id: machines that share a folder may have equal ones.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file atomically.

    Args:
        path: the file.
        text: its new content, written as UTF-8.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace the content of a file atomically by JSON (see `json_value`).

    Args:
        path: the file.
        value: what to write.
    """
    write_text(path, json.dumps(json_value(value), indent=2) + "\n")


def read_text(path: str | Path) -> str:
    """Return the content of a text file, with `?` for what is not UTF-8; "" if it cannot be read.

    Args:
        path: the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None when it is missing or not valid JSON.

    Args:
        path: the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def json_value(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinity as None, tensors as numbers, else text.

    Args:
        value: a nested structure of dicts, lists, numbers, text, scalar tensors or arrays, paths.
    """
    if isinstance(value, dict):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def fsync_tree(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to disk.

    Args:
        path: the file or folder.
    """
    for file in [*path.rglob("*"), path] if path.is_dir() else [path]:
        fsync(file)


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk.

    Args:
        path: a file or folder; file systems that cannot flush folders are accepted.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def is_first_rank() -> bool:
    """Return whether this process is rank 0, which writes the files that all ranks share."""
    distributed = sys.modules.get("torch.distributed")  # the command line must answer without torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
