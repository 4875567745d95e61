"""The folder of an export: complete or absent, with a record of what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.serialization._base import parse_size_to_int
from transformers.utils import logging

from ditty_di.dtypes import dtype_by_name
from ditty_di.io import fsync_tree

#: Record in every exported folder: kind, base, dtype, logit_diff, and the repository to upload to.
RECORD = "export.json"


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yield a new folder to write in, which replaces `path` if nothing raises inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    yield new
    fsync_tree(new)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def validate(*, dtype: str | None = None, max_shard_size: str | None = None) -> None:
    """Raise ValueError for an unknown dtype, or a size that is not one.

    Args:
        dtype: name in torch; None is not checked.
        max_shard_size: such as `5GB`; None is not checked.
    """
    if dtype is not None:
        dtype_by_name(dtype)
    if max_shard_size is None:
        return
    try:
        size = parse_size_to_int(str(max_shard_size))
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(
            f"max_shard_size={max_shard_size}: not a size; write a number and KB, MB, GB or TB, "
            f"such as 5GB"
        )


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of an export into its folder."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in a folder; empty for a folder that is not an export."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars, which would draw over the training's."""
    with ExitStack() as after:
        if logging.is_progress_bar_enabled():
            after.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
        yield
