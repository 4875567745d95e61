"""Files in object stores and on other machines, through fsspec: `s3://bucket/key` and the like.

Credentials and endpoints are those of the environment, as fsspec and the stores' own tools read
them: `AWS_PROFILE`, `AWS_ENDPOINT_URL`, `FSSPEC_S3_ANON=true`, ...
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from ditty_di.data.cache import build_once, cache_folder, fingerprint

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_WILDCARD = re.compile(r"[*?\[]")
#: Protocols whose package is an extra of ditty_di.
_EXTRAS = {"s3": "s3", "s3a": "s3"}
#: Bytes that are asked for at once where a file is read in place.
_BLOCK = 4 << 20
#: Attributes by which stores identify the content of a file, the most reliable first.
_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_url(path: object) -> bool:
    """Return whether a path is a URL, such as `s3://bucket/folder`."""
    return isinstance(path, str) and _URL.match(path) is not None


def has_wildcard(path: str) -> bool:
    """Return whether a path is a pattern."""
    return _WILDCARD.search(path) is not None


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what fsspec and the stores' clients raise into one sentence with the URL.

    Raises:
        ImportError: The protocol's package is not installed.
        ValueError: fsspec does not know the protocol.
        FileNotFoundError, PermissionError: As the store says.
        ConnectionError: Anything else that keeps the file from being read.
    """
    protocol = url.partition("://")[0]
    try:
        yield
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'ditty_di[{extra}]'" if extra else str(error)
        raise ImportError(f"{url}: {protocol}:// needs one more package: {how}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: there is no such file or folder") from error
    except PermissionError as error:
        raise PermissionError(
            f"{url}: the store refuses it ({error}); credentials are those of the environment, "
            "such as AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except Exception as error:  # those of botocore, aiohttp, ... share no base class
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            text = f"{url}: fsspec knows no protocol {protocol!r}; write s3://, gs://, az://, ..."
            raise ValueError(text) from error
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConnectionError(f"{url} cannot be reached: {first}") from error


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    To be asked for where it is used: a process must not take it from its parent.
    """
    with explained(url):
        import fsspec

        found: tuple[Any, str] = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return found


@contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a URL, and the path in it; errors in the block are explained."""
    found = filesystem(url)
    with explained(url):
        yield found


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A remote file, with as much of `Path` as the readers of files use.

    Attributes:
        url: Where it is.
        size: Its size in bytes; below 0: not known.
        version: Changes with its content: a digest or a time, as the store has it.
    """

    url: str
    size: int
    version: str = ""

    @classmethod
    def find(cls, url: str) -> RemoteFile:
        """Ask the store for a file's size and version."""
        with _store(url) as (fs, path):
            return _file(url, fs.info(path))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.url).name

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return PurePosixPath(self.url).stem

    @property
    def suffix(self) -> str:
        """The last suffix of the name."""
        return PurePosixPath(self.url).suffix

    @property
    def key(self) -> str:
        """A digest that is another one for each file and each version of it."""
        return fingerprint(self.url, str(self.size), self.version)

    def with_suffix(self, suffix: str) -> RemoteFile:
        """Return it with another last suffix."""
        return replace(self, url=self.url.removesuffix(self.suffix) + suffix)

    def stat(self) -> SimpleNamespace:
        """Return its size as `st_size`."""
        return SimpleNamespace(st_size=self.size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open it for its bytes, from any position."""
        return io.BufferedReader(_Raw(self.url), 1 << 16)

    def fetch(self, target: Path) -> None:
        """Write its content to a file of this machine."""
        with _store(self.url) as (fs, path):
            fs.get_file(path, str(target))

    def read_bytes(self) -> bytes:
        """Return its content."""
        with _store(self.url) as (fs, path):
            return bytes(fs.cat_file(path))

    def __str__(self) -> str:
        return self.url


class _Raw(io.RawIOBase):
    """An open remote file, whose errors are explained."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        with _store(url) as (fs, path):
            self._file = fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with explained(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with explained(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def listed(url: str, patterns: Sequence[str] = ("**",)) -> dict[str, RemoteFile]:
    """Return the files of a URL by name, sorted: a file, a folder's files, or those of a pattern.

    Names are relative to the folder, or to the part of the pattern without wildcards.

    Args:
        url: A file, a folder, or a pattern such as `s3://bucket/parts/*.jsonl`.
        patterns: Files of a folder to list, at any depth.

    Raises:
        ImportError, ValueError, PermissionError, ConnectionError: See `explained`.
    """
    found: dict[str, Any] = {}
    with _store(url) as (fs, root):
        root = root.rstrip("/")
        if (wildcard := _WILDCARD.search(root)) is not None:
            found = fs.glob(root, detail=True)
            root = root[: wildcard.start()].rpartition("/")[0]
        elif fs.isfile(root):
            found = {root: fs.info(root)}
            root = root.rpartition("/")[0]
        else:
            for pattern in patterns:
                found |= fs.glob(f"{root}/{pattern}", detail=True)
    return {
        path.removeprefix(root).lstrip("/"): _file(fs.unstrip_protocol(path), info)
        for path, info in sorted(found.items())
        if info["type"] == "file"
    }


def _file(url: str, info: dict[str, Any]) -> RemoteFile:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), "")
    return RemoteFile(url, int(info["size"] or 0), version)


def fetched_folder(url: str) -> Path | None:
    """Return a copy of a small remote folder, such as a tokenizer's; None if it has no files."""
    files = listed(url)
    if not files:
        return None

    def build(aside: Path) -> None:
        for name, file in files.items():
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            file.fetch(target)

    key = fingerprint(*(file.key for file in files.values()))
    return build_once(cache_folder() / "remote" / "folders" / key[:32], build)


def upload(folder: Path, url: str, names: Sequence[str]) -> int:
    """Copy files of a folder to a remote one, in their order; return how many were copied.

    What the store has under the same name and with the same size is left, but for the last file,
    which says that the others are there.

    Args:
        folder: The folder.
        url: The remote folder.
        names: Paths of the files in the folder.
    """
    there = {name: file.size for name, file in listed(url).items()}
    fs, root = filesystem(url)
    missing = [n for n in names[:-1] if there.get(n) != (folder / n).stat().st_size]
    for name in (*missing, *names[-1:]):
        with explained(f"{url.rstrip('/')}/{name}"):
            fs.put_file(str(folder / name), f"{root.rstrip('/')}/{name}")
    return len(missing) + 1
