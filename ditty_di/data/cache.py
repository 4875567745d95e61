"""Files that one process builds once and all processes then only read."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ditty_di.io import fsync, fsync_tree

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_REPORT_SECONDS = 5.0


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return `cache_dir`, or `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`."""
    chosen = cache_dir or os.environ.get("DITTY_DI_CACHE") or "~/.cache/ditty_di"
    return Path(chosen).expanduser()


def fingerprint(*parts: str | bytes) -> str:
    """Return the SHA-256 of a sequence of texts; ("ab", "c") and ("a", "bc") differ."""
    return fingerprint_of(parts)


def fingerprint_of(parts: Iterable[str | bytes]) -> str:
    """Return the `fingerprint` of texts of which one is in memory at a time."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, built first if it does not exist.

    The first process to come builds, the others wait on a file lock. No collective is involved, so
    the process group need not exist and cannot time out. The target appears whole, by a rename: a
    killed build leaves nothing that looks finished.

    Args:
        target: The file or folder.
        build: Called with a temporary path beside the target, to which it writes.

    Raises:
        OSError: The cache folder cannot be written.
    """
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            held = lock.acquire(timeout=1)
        except Timeout:
            log.info("waiting for another process that writes %s ...", target)
            held = lock.acquire()
    except OSError as error:
        raise OSError(
            f"cannot write the cache folder {target.parent} ({error.strerror or error}). "
            "Pass `cache_dir`, or set DITTY_DI_CACHE to a folder that can be written."
        ) from error
    with held:
        if target.exists():
            return target
        for leftover in target.parent.glob(f".{target.name}.*"):
            _remove(leftover)  # of a killed build: the lock's holder is the only builder
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            build(aside)
            fsync_tree(aside)
            os.replace(aside, target)
            fsync(target.parent)
        finally:
            _remove(aside)
    return target


def counted(items: Iterable[_T], doing: str, noun: str) -> Iterator[_T]:
    """Yield the items; log `doing` at once, then the number of items every five seconds."""
    log.info("%s ...", doing)
    reported = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            log.info("%s: %s %s so far", doing, f"{number:,}", noun)


def chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
