"""Files that are built once and then only read, however many processes ask for them at once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ditty_di.io import fsync, fsync_tree

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_REPORT_SECONDS = 5.0


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, or `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`."""
    chosen = cache_dir or os.environ.get("DITTY_DI_CACHE") or "~/.cache/ditty_di"
    return Path(chosen).expanduser()


def fingerprint(*parts: str | bytes) -> str:
    """SHA-256 of a sequence of texts; ("ab", "c") and ("a", "bc") differ."""
    return _digest(part.encode() if isinstance(part, str) else part for part in parts)


def documents_fingerprint(documents: Iterable[str]) -> str:
    """SHA-256 of the documents, in their order."""
    return _digest(document.encode() for document in documents)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, after `build(aside)` has written it (a file or a folder) unless it is there.

    Whoever comes first builds, the others wait on a file lock: no collective is involved, so the
    process group need not exist and cannot time out. `build` writes beside the target; a rename
    makes the whole thing visible at once, so a killed build leaves nothing that looks finished.

    Raises `OSError` when the cache cannot be written, naming the folder.
    """
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.info("waiting for another process that writes %s ...", target)
            lock.acquire()
    except OSError as error:
        raise OSError(
            f"cannot write the cache folder {target.parent} ({error.strerror or error}). "
            "Pass `cache_dir`, or set DITTY_DI_CACHE to a folder that can be written."
        ) from error
    try:
        if target.exists():
            return target
        for leftover in target.parent.glob(f".{target.name}.*"):
            _remove(leftover)  # of a build that was killed: whoever holds the lock is alone
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            build(aside)
            fsync_tree(aside)
            os.replace(aside, target)
            fsync(target.parent)
        finally:
            _remove(aside)
    finally:
        lock.release()
    return target


def counted(items: Iterable[_T], doing: str, noun: str) -> Iterator[_T]:
    """Yield the items; log what is done with them at once, then every five seconds how many."""
    log.info("%s ...", doing)
    reported, number = time.monotonic(), 0
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            log.info("%s: %s %s so far", doing, f"{number:,}", noun)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
