"""Copies of remote files on this machine, at most so many bytes of them."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ditty_di.data import options
from ditty_di.data.cache import cache_folder
from ditty_di.data.reading.remote import RemoteFile
from ditty_di.io import fsync

log = logging.getLogger(__name__)

#: How often a file is fetched before its content is taken as wrong.
_ATTEMPTS = 3
_POLL_SECONDS = 0.02
#: Lock under which copies are removed and room is reserved; no other lock is waited for under it.
_ROOM = "room"


class FileCache:
    """Copies of remote files in a folder of this machine, at most `limit_gb` of them.

    Any number of processes may share the folder. A file is fetched by one of them, beside its
    place, compared with its size and digest, flushed to disk and renamed: a fetch that is killed
    leaves nothing that is taken for whole. Where there is no room, the files that were used least
    recently are removed; a process that has one of them open reads on.

    Args:
        folder: The folder; None: `remote` in `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.
        limit_gb: Largest size of all files, in GB (10^9 bytes), those that are being fetched
            included.

    Raises:
        ValueError: A limit that is not above 0.
    """

    @staticmethod
    def validate(*, limit_gb: float = 1.0) -> None:
        """Raise `ValueError` for an option out of range."""
        options.require(limit_gb > 0, f"limit_gb={limit_gb} must be above 0")

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, limit_gb: float = 20.0
    ) -> None:
        self.validate(limit_gb=limit_gb)
        self.folder = cache_folder() / "remote" if folder is None else Path(folder).expanduser()
        self.limit_gb = limit_gb

    def path(self, file: RemoteFile, key: str | None = None) -> Path:
        """Return where the copy of a file is, if there is one.

        Args:
            file: The file.
            key: Digest that the copy is found by; None: that of URL, size and version.
        """
        return self.folder / f"{(key or file.key)[:16]}-{file.name}"

    def has(self, file: RemoteFile, key: str | None = None) -> bool:
        """Return whether there is a copy of a file, and note that it is used now."""
        try:
            os.utime(self.path(file, key))
        except FileNotFoundError:
            return False
        return True

    def fetch(
        self,
        file: RemoteFile,
        *,
        key: str | None = None,
        sha256: str | None = None,
        wait: bool = True,
    ) -> bool:
        """Fetch a file if there is no copy of it; return whether there is one now.

        Args:
            file: The file.
            key: See `path`.
            sha256: Digest of its content; None is not compared.
            wait: Wait for another process that fetches it.

        Raises:
            ValueError, OSError, ...: See `held`.
        """
        if self.has(file, key):
            return True
        try:
            with self._locked(_lock_of(self.path(file, key).name), wait):
                self._fetch(file, key, sha256)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def held(
        self, file: RemoteFile, *, key: str | None = None, sha256: str | None = None
    ) -> Iterator[Path]:
        """Yield the copy of a file, fetched first if there is none.

        It is not removed within the block. What is opened there can be read afterwards as well.

        Args:
            file: The file.
            key: See `path`.
            sha256: See `fetch`.

        Raises:
            ValueError: The file is larger than the limit, or not what size and digest say.
            OSError: The folder cannot be written, or the disk is full.
            ImportError, FileNotFoundError, PermissionError, ConnectionError: See
                `remote.explained`.
        """
        target = self.path(file, key)
        with self._locked(_lock_of(target.name)):
            self._fetch(file, key, sha256)
            yield target

    @contextmanager
    def _locked(self, lock: str, wait: bool = True) -> Iterator[None]:
        folder = self.folder / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = (folder / lock).open("w")
        except OSError as error:
            raise OSError(
                f"cannot write the cache folder {self.folder} ({error.strerror or error}); give "
                "another folder for copies of remote files, or set DITTY_DI_CACHE"
            ) from error
        with stream:  # closing it, or the process's end, releases the lock
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    @contextmanager
    def _tried(self, name: str, own: str) -> Iterator[bool]:
        """Yield whether no other process holds a file; within the block none can."""
        with ExitStack() as stack:
            free = True
            if _lock_of(name) != _lock_of(own):
                try:
                    stack.enter_context(self._locked(_lock_of(name), wait=False))
                except BlockingIOError:
                    free = False
            yield free

    def _fetch(self, file: RemoteFile, key: str | None, sha256: str | None) -> None:
        """Fetch a file whose lock is held, unless there is a copy."""
        if self.has(file, key):
            return
        target = self.path(file, key)
        if file.size < 0:
            file = RemoteFile.find(file.url)
        aside = self.folder / f".{target.name}.{uuid.uuid4().hex}"
        reserved = aside.with_name(f"{aside.name}.reserved")
        self._remove_leftovers(target.name)
        try:
            self._reserve(file, target.name, reserved)
            for attempt in range(1, _ATTEMPTS + 1):
                file.fetch(aside)
                if (problem := _difference(aside, file, sha256)) is None:
                    break
                log.warning("%s: %s (attempt %d of %d)", file, problem, attempt, _ATTEMPTS)
            else:
                raise ValueError(f"{file}: {problem}: write the file to the store again")
            fsync(aside)
            with self._locked(_ROOM):  # who counts would find neither the copy nor its reservation
                os.replace(aside, target)
                reserved.unlink(missing_ok=True)
        except OSError as error:
            if error.errno is None:  # of the store
                raise
            raise OSError(
                error.errno,
                f"{self.folder}: {error.strerror}: fetching {file} ({file.size} bytes); lower "
                f"limit_gb={self.limit_gb:g}, or give a folder on a larger disk",
            ) from error
        finally:
            aside.unlink(missing_ok=True)
            reserved.unlink(missing_ok=True)
        fsync(self.folder)

    def _reserve(self, file: RemoteFile, name: str, reserved: Path) -> None:
        """Make room for a file, and keep it by a sparse file of its size."""
        if self.limit_gb == math.inf:
            return
        if file.size > self.limit_gb * 1e9:
            raise ValueError(
                f"{file} has {file.size / 1e9:.3g} GB, more than limit_gb={self.limit_gb:g} of the "
                f"copies in {self.folder}: raise it"
            )
        while True:
            with self._locked(_ROOM):
                if self._make_room(file.size, name):
                    with reserved.open("wb") as stream:
                        stream.truncate(file.size)
                    return
            time.sleep(_POLL_SECONDS)  # all copies are held, or still being fetched

    def _make_room(self, size: int, own: str) -> bool:
        """Remove copies until a file of some size fits; return whether it does.

        Args:
            size: Bytes of the file.
            own: Its name, whose lock is held.
        """
        total, copies = size, list[tuple[float, int, os.DirEntry[str]]]()
        for entry in list(os.scandir(self.folder)):
            try:
                found = entry.stat()
            except FileNotFoundError:  # removed or renamed meanwhile
                continue
            if not entry.is_file():
                continue
            if not entry.name.startswith("."):
                copies.append((found.st_mtime, found.st_size, entry))
            elif not entry.name.endswith(".reserved"):
                continue  # that has been reserved
            else:
                name = entry.name[1:].rsplit(".", 2)[0]
                with self._tried(name, own) as free:
                    if free:  # of a fetch that was killed
                        self._remove_leftovers(name)
                        continue
            total += found.st_size
        for _, bytes_, entry in sorted(copies, key=lambda copy: copy[0]):
            if total <= self.limit_gb * 1e9:
                break
            with self._tried(entry.name, own) as free:
                if free:
                    Path(entry.path).unlink(missing_ok=True)
                    total -= bytes_
        return total <= self.limit_gb * 1e9

    def _remove_leftovers(self, name: str) -> None:
        """Remove what fetches of a file have left, whose lock is held."""
        for entry in list(os.scandir(self.folder)):
            if entry.name.startswith(f".{name}."):
                Path(entry.path).unlink(missing_ok=True)


def _lock_of(name: str) -> str:
    """Return the lock of a file; some files have one in common, so that there are only 256."""
    return hashlib.sha256(name.encode()).hexdigest()[:2]


def _difference(path: Path, file: RemoteFile, sha256: str | None) -> str | None:
    if (size := path.stat().st_size) != file.size:
        return f"{size} bytes were fetched, expected {file.size}"
    if sha256 is None:
        return None
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return None if found == sha256 else f"SHA-256 {found[:12]}, expected {sha256[:12]}"
