"""Checkpoints in an object store: which there are, sending one, fetching one, removing one.

    URL/step-00000100/
      uploading.json                sent first, removed last: the manifest of what is being sent
      .metadata  __0_0.distcp ...
      manifest.json                 sent after all others: without it nothing is a checkpoint

An upload that is cut short goes on with the files that are missing. What is there already belongs
to it if `uploading.json` is the same manifest, digests included: another start of the run may have
written other bytes of equal sizes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ditty_di.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    digest_of,
    folder_name,
    step_of,
)
from ditty_di.checkpoint.retention import BEST, best_step
from ditty_di.data.cache import build_once, cache_folder, fingerprint
from ditty_di.data.reading.remote import (
    RemoteFile,
    explained,
    filesystem,
    has_wildcard,
    is_url,
    listed,
)
from ditty_di.io import fsync_tree

log = logging.getLogger(__name__)

UPLOADING = "uploading.json"
#: How often a file is fetched before its content is taken as damaged.
_ATTEMPTS = 3
#: Seconds between attempts to reach a store that a run cannot start without.
_DELAYS = (1.0, 4.0, 10.0)

_T = TypeVar("_T")
Files = dict[str, RemoteFile]


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A whole checkpoint in a store.

    Args:
        url: its folder.
        files: what is there, by name.
        manifest: its manifest.
    """

    url: str
    files: Files
    manifest: Manifest

    @classmethod
    def open(cls, url: str, files: Files) -> RemoteCheckpoint:
        """Return the checkpoint that the files of a folder are.

        Args:
            url: the folder.
            files: what is there, by name.

        Raises:
            CheckpointError: it is not whole; the message says why.
            PermissionError, ConnectionError: the store cannot be read.
        """
        if MANIFEST not in files:
            raise CheckpointError(f"{url} has no {MANIFEST}")
        try:
            manifest = _read_manifest(files[MANIFEST])
        except (FileNotFoundError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{url}/{MANIFEST} is not a manifest: {error}") from error
        for name, size in manifest.files.items():
            if PurePosixPath(name).name != name:
                raise CheckpointError(f"{url}/{MANIFEST} names a file outside its folder: {name!r}")
            if name not in files:
                raise CheckpointError(f"{url}/{name} is missing")
            if files[name].size != size:
                found = files[name].size
                raise CheckpointError(f"{url}/{name} has {found} bytes instead of {size}")
        return cls(url, files, manifest)

    def fetch(self, target: Path) -> None:
        """Write the files, with the content that they were sent with, and flush them to disk.

        Args:
            target: an empty folder, or none yet.

        Raises:
            CheckpointError: a file has another content than when it was sent.
            OSError: the disk is full, or the store cannot be read.
        """
        target.mkdir(parents=True, exist_ok=True)
        for name, size in self.manifest.files.items():
            file, digest = target / name, self.manifest.digests.get(name)
            for _ in range(_ATTEMPTS):
                self.files[name].fetch(file)
                if file.stat().st_size == size and digest in (None, digest_of(file)):
                    break
            else:
                raise CheckpointError(
                    f"{self.url}/{name} is damaged: its content has another digest than when it "
                    f"was written"
                )
        (target / MANIFEST).write_text(self.manifest.dump(), encoding="utf-8")
        fsync_tree(target)


class RemoteFolder:
    """The checkpoints below a URL.

    Args:
        url: the folder of `step-00000100/` and so on.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def url_of(self, step: int) -> str:
        """Return where a step's checkpoint is.

        Args:
            step: optimizer steps done.
        """
        return f"{self.url}/{folder_name(step)}"

    def found(self) -> dict[int, Files]:
        """Return the files of every folder with the name of a checkpoint, whole or not.

        Raises:
            ImportError, ValueError, PermissionError, ConnectionError: see `explained`.
        """
        found: dict[int, Files] = {}
        for path, file in listed(self.url).items():
            folder, _, name = path.partition("/")
            if (step := step_of(folder)) is not None and name:
                found.setdefault(step, {})[name] = file
        return found

    def whole(
        self, found: Mapping[int, Files] | None = None, problems: dict[int, str] | None = None
    ) -> dict[int, RemoteCheckpoint]:
        """Return the whole checkpoints by step, in ascending order.

        Args:
            found: what `found` returned; None asks the store.
            problems: gets why others are not whole.
        """
        whole: dict[int, RemoteCheckpoint] = {}
        for step, files in sorted((self.found() if found is None else found).items()):
            try:
                checkpoint = RemoteCheckpoint.open(self.url_of(step), files)
                if checkpoint.manifest.step != step:
                    raise CheckpointError(f"{checkpoint.url} holds step {checkpoint.manifest.step}")
                whole[step] = checkpoint
            except CheckpointError as error:
                if problems is not None:
                    problems[step] = str(error)
        return whole

    def send(
        self, checkpoint: Path, manifest: Manifest, moved: Callable[[], None] = lambda: None
    ) -> int:
        """Copy a checkpoint, or the rest of it; return how many files were sent.

        Args:
            checkpoint: its folder on this machine.
            manifest: its manifest.
            moved: called whenever bytes have been sent.

        Raises:
            OSError: the store does not take it, or has files of other sizes than were sent.
        """
        from fsspec.callbacks import Callback

        url = self.url_of(manifest.step)
        fs, root = filesystem(url)
        there = listed(url)
        if not _is_sending(there, manifest):
            self.remove(there)
            there = {}
            with explained(f"{url}/{UPLOADING}"):
                _write(fs, root, UPLOADING, manifest.dump().encode())
        sizes = {name: file.size for name, file in there.items()}
        missing = [name for name, size in manifest.files.items() if sizes.get(name) != size]
        tell = Callback(hooks={"moved": lambda size, value, **_: moved()})
        for name in missing:
            with explained(f"{url}/{name}"):
                fs.put_file(str(checkpoint / name), f"{root}/{name}", callback=tell)
            moved()
        sizes = {name: file.size for name, file in listed(url).items()}
        for name, size in manifest.files.items():
            if sizes.get(name) != size:
                raise ConnectionError(
                    f"{url}/{name} was sent, but the store has {sizes.get(name, 0)} of its {size} "
                    f"bytes"
                )
        with explained(f"{url}/{MANIFEST}"):
            fs.pipe_file(f"{root}/{MANIFEST}", manifest.dump().encode())
            fs.rm_file(f"{root}/{UPLOADING}")
        return len(missing) + 1

    def remove(self, files: Files) -> None:
        """Remove the files of a checkpoint; its manifest first, as half of it must not look whole.

        Args:
            files: by name.
        """
        for name in sorted(files, key=lambda name: name != MANIFEST):
            url = files[name].url
            fs, path = filesystem(url)
            with explained(url):
                fs.rm_file(path)


def _is_sending(there: Files, manifest: Manifest) -> bool:
    """Return whether what is there was sent by an upload of this manifest that did not end."""
    if UPLOADING not in there or MANIFEST in there:
        return False
    try:
        return _read_manifest(there[UPLOADING]) == manifest
    except (TypeError, AttributeError, ValueError):
        return False


def _write(fs: Any, root: str, name: str, content: bytes) -> None:
    """Write a small file; make its folder where a store has folders that must exist."""
    try:
        fs.pipe_file(f"{root}/{name}", content)
    except FileNotFoundError:
        missing = [root]
        while not fs.exists(parent := fs._parent(missing[-1])):
            if parent in ("", missing[-1]):  # a bucket, which is not ours to make
                raise
            missing.append(parent)
        for folder in reversed(missing):
            fs.mkdir(folder, create_parents=False)
        fs.pipe_file(f"{root}/{name}", content)


def _read_manifest(file: RemoteFile) -> Manifest:
    return _parsed(file) if file.version else Manifest.parse(file.read_bytes())


@lru_cache(maxsize=1024)
def _parsed(file: RemoteFile) -> Manifest:
    return Manifest.parse(file.read_bytes())


def patiently(do: Callable[[], _T]) -> _T:
    """Call a function that reads a store, again after a while if it cannot be reached.

    Args:
        do: the function.

    Raises:
        ConnectionError: of the last attempt.
    """
    for delay in _DELAYS:
        try:
            return do()
        except ConnectionError as error:
            log.debug("trying again in %g s: %s", delay, error)
            time.sleep(delay)
    return do()


def cached(url: str) -> Path:
    """Return a copy on this machine of a checkpoint in a store; it is fetched once.

    Args:
        url: a checkpoint, or a folder of them: then the newest undamaged one; `URL/best` is the one
            with the lowest objective.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be fetched.
    """
    url = url.rstrip("/")
    try:
        return _cached(url)
    except (OSError, ImportError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def _cached(url: str) -> Path:
    files = patiently(lambda: listed(url))
    if MANIFEST in files:
        return _copy(RemoteCheckpoint.open(url, files))
    wants_best = not files and url.rpartition("/")[2] == BEST
    folder = RemoteFolder(url.removesuffix(f"/{BEST}") if wants_best else url)
    problems: dict[int, str] = {}
    whole = patiently(lambda: folder.whole(problems=problems))
    if wants_best:
        objectives = {step: found.manifest.objective for step, found in whole.items()}
        return _copy(whole[best_step(objectives, folder.url)])
    for step in sorted({*whole, *problems}, reverse=True):
        if step in whole:
            try:
                return _copy(whole[step])
            except CheckpointError as error:
                problems[step] = str(error)
        log.warning("passing over a checkpoint that is not whole: %s", problems[step])
    raise CheckpointError(
        f"{url} holds no whole checkpoint; give a folder with {folder_name(100)}/ and so on in it, "
        f"or one of those"
    )


def _copy(checkpoint: RemoteCheckpoint) -> Path:
    size = sum(checkpoint.manifest.files.values())
    key = fingerprint(checkpoint.url, checkpoint.manifest.dump())[:32]
    target = cache_folder() / "remote" / "checkpoints" / key / folder_name(checkpoint.manifest.step)

    def build(aside: Path) -> None:
        log.info("fetching %s (%.3g GB) into %s", checkpoint.url, size / 1e9, target.parent)
        with explained_disk(target, size):
            checkpoint.fetch(aside)

    return build_once(target, build)


@contextmanager
def explained_disk(target: Path, size: int) -> Iterator[None]:
    """Name the folder that a checkpoint does not fit into.

    Args:
        target: what is written.
        size: bytes of the checkpoint.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of the store
            raise
        raise CheckpointError(
            f"{target.parent} does not take the checkpoint, {size / 1e9:.3g} GB: "
            f"{error.strerror}; copies of checkpoints in stores are below DITTY_DI_CACHE"
        ) from error


def require_url(key: str, url: str) -> str | None:
    """Return why a URL cannot be one of a store, None if it can; nothing is asked of the store.

    Args:
        key: its key in the configuration, for the message.
        url: the URL.
    """
    if not is_url(url) or has_wildcard(url):
        return f"{key}={url}: write the URL of a folder, such as s3://bucket/runs/mine"
    try:
        with explained(url):
            import fsspec

            fsspec.get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        return f"{key}={error}"
    return None
