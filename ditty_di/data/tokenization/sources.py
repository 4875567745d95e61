"""Where text comes from: files of this machine or an object store, or of a dataset on the Hub."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from ditty_di.data import options
from ditty_di.data.cache import cache_folder, counted
from ditty_di.data.reading.file_cache import FileCache
from ditty_di.data.reading.files import AnyFile, kind_of
from ditty_di.data.reading.remote import RemoteFile, has_wildcard, is_url, listed
from ditty_di.data.tokenization import hub
from ditty_di.data.tokenization.documents import RECORDS

_UNITS = {"": 2**20, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SUFFIXES = (".txt", *RECORDS)


@dataclass(frozen=True)
class File:
    """A file of a source.

    Attributes:
        name: Its path below the source's folder, which says what it is wherever it lies.
        path: Where it lies.
    """

    name: str
    path: AnyFile


class Source(Protocol):
    """Files with text, and how their documents are found."""

    text_key: str
    """Key or column of the document, in records."""
    documents: str
    """Unit of plain text that is a document: `file`, `line` or `paragraph`."""

    def files(self) -> list[File]:
        """Return the files, sorted by name; they can be read."""

    def download(self, check: bool = False) -> dict[str, Any]:
        """Bring the files here; return what there is, for a message."""


@dataclass(kw_only=True)
class _Documents:
    """Base of sources of files.

    Attributes:
        text_key: Key or column of the document, in records.
        documents: Unit of plain text that is a document: `file`, `line` or `paragraph`.
        sample: Take only the first files, up to this size: a number of MiB, or `"2GB"`.
    """

    text_key: str = "text"
    documents: str = "file"
    sample: float | str | None = None

    @staticmethod
    def validate(*, documents: str = "file", sample: Any = None, patterns: Any = ()) -> None:
        """Raise `ValueError` for an option out of range."""
        options.one_of(("file", "line", "paragraph"), documents=documents)
        size_of(sample)
        text = f"patterns={patterns!r}: write a list, [{patterns}]"
        options.require(not isinstance(patterns, str), text)

    def __post_init__(self) -> None:
        given = vars(self)
        self.validate(**{name: given[name] for name in ("documents", "sample", "patterns")})


@dataclass
class TextFiles(_Documents):
    """Text files, JSON lines, JSON, CSV or Parquet files, each also compressed.

    Args:
        path: A file, a folder (all files in it that have documents, recursively), a pattern such as
            `parts/*.jsonl.zst`, or a list of them. Each may be a URL, such as `s3://bucket/folder`:
            what `download` has not brought here is read where it is.
        patterns: Files of a folder to read, such as `["**/*.py"]`; other files than those of
            records are read as plain text. Empty: .txt files and records.
        text_key: See `Source`.
        documents: See `Source`.
        sample: Take only the first files, up to this size: a number of MiB, or `"2GB"`.
    """

    path: str | os.PathLike[str] | Sequence[str]
    patterns: Sequence[str] = field(default=(), kw_only=True)

    @property
    def paths(self) -> list[str | os.PathLike[str]]:
        """The path as a list."""
        return [self.path] if isinstance(self.path, str | os.PathLike) else list(self.path)

    def files(self) -> list[File]:
        """Return the files, sorted by name.

        Raises:
            FileNotFoundError: No file was found.
            ImportError, PermissionError, ConnectionError: Of a URL, see `remote.explained`.
        """
        return [File(file.name, self._copy(file.path) or file.path) for file in self._listed()]

    def _listed(self) -> list[File]:
        found = sorted(
            {file for path in self.paths for file in self._found(path)}, key=lambda file: file.name
        )
        if not found:
            wanted = ", ".join(self.patterns or (f"*{suffix}" for suffix in _SUFFIXES))
            raise FileNotFoundError(
                f"no text at path={', '.join(map(str, self.paths))}: there is no such file, or no "
                f"file of {wanted} in the folder"
            )
        return within(found, [file.path.stat().st_size for file in found], self.sample)

    def download(self, check: bool = False) -> dict[str, Any]:
        """Bring the files of URLs here, and go on where it broke off; others are here already.

        Args:
            check: Without effect: a copy has been compared with its size when it was fetched.

        Raises:
            FileNotFoundError, ImportError, PermissionError, ConnectionError: See `files`.
            OSError: The disk has not enough space.
        """
        found = self._listed()
        size = sum(file.path.stat().st_size for file in found)
        remote = [file.path for file in found if isinstance(file.path, RemoteFile)]
        missing = [file for file in remote if self._copy(file) is None]
        cache = _downloads()
        hub.require_space(cache.folder, sum(file.size for file in missing), str(self.paths[0]))
        if missing:
            for file in counted(missing, f"downloading {len(missing)} files", "files"):
                cache.fetch(file)
        folder = cache.folder if remote else os.path.commonpath(self.paths)
        return {"files": len(found), "bytes": size, "folder": str(folder)}

    @staticmethod
    def _copy(file: AnyFile) -> Path | None:
        """Return the copy of a remote file that a download has made."""
        if not isinstance(file, RemoteFile) or not _downloads().has(file):
            return None
        return _downloads().path(file)

    def _found(self, path: str | os.PathLike[str]) -> Iterator[File]:
        if is_url(path):
            url = str(path)
            for name, remote in listed(url, self.patterns or ("**",)).items():
                named = has_wildcard(url) or url.endswith(f"/{name}")
                if named or self._has_documents(name):
                    yield File(name, remote)
            return
        root = Path(path).expanduser()
        if root.is_file():
            yield File(root.name, root)
        elif root.is_dir():
            for pattern in self.patterns or ("**/*",):
                for file in root.glob(pattern):
                    name = file.relative_to(root).as_posix()
                    if self._has_documents(name) and file.is_file():
                        yield File(name, file)
        else:
            # Below the part without wildcards: equal names in two folders are two files.
            fixed = Path(*takewhile(lambda part: not has_wildcard(part), root.parts[:-1]))
            for file in map(Path, glob(str(root), recursive=True)):
                if file.is_file():
                    yield File(file.relative_to(fixed).as_posix(), file)

    def _has_documents(self, name: str) -> bool:
        """Return whether a file of a folder is read, by its path in it."""
        hidden = any(part.startswith(".") for part in Path(name).parts)
        return not hidden and (bool(self.patterns) or kind_of(Path(name)) in _SUFFIXES)


def _downloads() -> FileCache:
    """Return where downloads of remote files are; nothing of it is removed."""
    return FileCache(cache_folder() / "downloads" / "files", limit_gb=math.inf)


@dataclass
class HubFiles(_Documents):
    """Files of a dataset on the Hugging Face Hub, which `task=download` brings here.

    Args:
        path: The dataset, `user/name`.
        patterns: Its files, such as `["data/train-*.parquet"]`; `*` matches `/` too.
        revision: Branch, tag or commit; None: the main branch.
        text_key: See `Source`.
        documents: See `Source`.
        sample: Take only the first files, up to this size: a number of MiB, or `"2GB"`.
    """

    path: str
    patterns: Sequence[str]
    revision: str | None = field(default=None, kw_only=True)

    def files(self) -> list[File]:
        """Return the files, downloaded first where they are missing.

        Raises:
            ConnectionError, FileNotFoundError, PermissionError, OSError: See `hub.download`.
        """
        folder, names = self._download()
        return [File(name, folder / name) for name in names]

    def download(self, check: bool = False) -> dict[str, Any]:
        """Bring the files here; go on with a download that broke off.

        Args:
            check: Compare the content of every file with the Hub's digest.

        Raises:
            ConnectionError, FileNotFoundError, PermissionError, OSError: See `hub.download`.
            ValueError: A file has another content.
        """
        folder, names = self._download(check)
        size = sum((folder / name).stat().st_size for name in names)
        return {"files": len(names), "bytes": size, "folder": str(folder)}

    def _download(self, check: bool = False) -> tuple[Path, list[str]]:
        def choose(sizes: dict[str, int]) -> list[str]:
            return within(sorted(sizes), [sizes[name] for name in sorted(sizes)], self.sample)

        return hub.download(self.path, self.patterns, self.revision, choose, check)


def all_sources(
    source: Source | None = None, sources: Mapping[str, Source] | None = None
) -> dict[str, Source]:
    """Return sources by name; the name of a single one is empty.

    Raises:
        ValueError: Neither or both are given.
    """
    if (source is None) == (not sources):
        raise ValueError(
            "source: these data have no text to tokenize; take data=files data.path=FOLDER, or "
            "data with a node `source` (or `sources`), such as data=fineweb_edu"
        )
    return {"": source} if source is not None else dict(sources or {})


def within(files: list[Any], sizes: list[int], sample: float | str | None) -> list[Any]:
    """Return the first files up to a size, at least one."""
    if sample is None:
        return files
    limit, total, kept = size_of(sample), 0, list[Any]()
    for file, size in zip(files, sizes, strict=True):
        if kept and total + size > (limit or 0):
            break
        kept.append(file)
        total += size
    return kept


def size_of(sample: float | str | None) -> int | None:
    """Return a size in bytes: of a number in MiB, or of text such as `2GB`.

    Raises:
        ValueError: It is neither.
    """
    if sample is None:
        return None
    number, unit = str(sample), ""
    if match := re.fullmatch(r"([\d.]+)\s*([KMGT]B)", number.strip(), re.IGNORECASE):
        number, unit = match[1], match[2].upper()
    try:
        size = float(number) * _UNITS[unit]
    except ValueError:
        size = 0.0
    if not size > 0:
        raise ValueError(
            f"sample={sample!r}: write a number of MiB, or a size such as 500MB or 2GB"
        )
    return int(size)
