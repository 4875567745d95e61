"""A folder of checkpoints on disk, and the order in which it changes.

    .saving-step-00000200-1f3a/   being written; nobody reads it
    step-00000100/                whole: it got its name after everything in it was on disk
      manifest.json               written last: step, world size, keys, files with sizes and digests
      .metadata  __0_0.distcp ... torch.distributed.checkpoint's own
    .deleting-step-00000050/      on its way out; nobody reads it

Renaming is the only thing that makes or unmakes a checkpoint, so a process that dies at any moment
leaves whole checkpoints and leftovers with a leading dot.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

log = logging.getLogger(__name__)

MANIFEST, METADATA = "manifest.json", ".metadata"
_NAME = re.compile(r"step-(\d{8,})")
_SAVING, _DELETING = ".saving-", ".deleting-"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, found or read; every rank raises it."""


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint says of itself.

    Args:
        step: optimizer steps done.
        world_size: ranks that saved it.
        torch: version of torch that wrote it.
        files: name and size in bytes of every other file.
        keys: entries, `<state>.<key>`.
        digests: SHA-256 of every other file, by name; empty in checkpoints of earlier versions.
        digest: SHA-256 of the manifest itself without this field; empty if `digests` is.
    """

    step: int
    world_size: int
    torch: str
    files: dict[str, int]
    keys: list[str]
    digests: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    def own_digest(self) -> str:
        content = json.dumps(asdict(replace(self, digest="")), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a whole checkpoint.

    Raises:
        CheckpointError: it is not whole; the message says why.
    """
    try:
        content: Any = json.loads((checkpoint / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        what = f"has no {MANIFEST}" if checkpoint.is_dir() else "is no folder"
        raise CheckpointError(f"{checkpoint} {what}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} cannot be read: {error}") from error
    try:
        manifest = Manifest(**content)
        sizes, _ = manifest.files.items(), manifest.digests.items()
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is no manifest: {error}") from error
    for name, size in sizes:
        try:
            found = (checkpoint / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{checkpoint / name} is missing: {error.strerror}") from error
        if found != size:
            raise CheckpointError(f"{checkpoint / name} has {found} bytes instead of {size}")
    return manifest


def digest_of(file: Path) -> str:
    """SHA-256 of a file's content; a file that did not change is read once per process."""
    status = file.stat()
    return _digest_of(str(file), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_of(file: str, size: int, modified: int) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def verify(checkpoint: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare the content of files (None: of all) with the digests in the manifest.

    A checkpoint of an earlier version has no digests and passes.

    Raises:
        CheckpointError: the first file with another content than was written.
    """
    damaged = MANIFEST if manifest.digest and manifest.digest != manifest.own_digest() else None
    for name in manifest.digests if names is None else names:
        if damaged is None and digest_of(checkpoint / name) != manifest.digests[name]:
            damaged = name
    if damaged is not None:
        raise CheckpointError(
            f"{checkpoint / damaged} is damaged: its content has another digest than when it was "
            f"written"
        )


def latest_intact(folder: str | Path) -> Path | None:
    """As `latest`, but of checkpoints whose content is what was written."""
    damaged: dict[Path, str] = {}
    while (checkpoint := latest(folder, damaged)) is not None:
        try:
            verify(checkpoint, read_manifest(checkpoint))
        except CheckpointError as error:
            pass_over_damaged(checkpoint, str(error), damaged)
        else:
            break
    return checkpoint


def pass_over_damaged(checkpoint: Path, problem: str, damaged: dict[Path, str]) -> None:
    log.warning("passing over a checkpoint that is damaged: %s", problem)
    damaged[checkpoint] = problem


def latest(folder: str | Path, damaged: Mapping[Path, str] = MappingProxyType({})) -> Path | None:
    """The newest whole checkpoint in `folder`; newer ones that are not whole are logged.

    Args:
        damaged: checkpoints that were passed over already, and why.

    Raises:
        CheckpointError: there are checkpoints and none is whole. A crashed save does not leave
            that, and to start anew as if there were none would throw a training away.
    """
    damage: CheckpointError | None = None
    for checkpoint in reversed(_named(Path(folder))):
        if checkpoint in damaged:
            damage = damage or CheckpointError(damaged[checkpoint])
            continue
        try:
            _whole(checkpoint)
        except CheckpointError as error:
            log.warning("passing over a checkpoint that is not whole: %s", error)
            damage = damage or error
        else:
            return checkpoint
    if damage is not None:
        raise CheckpointError(f"no checkpoint is whole: {damage}; move it away to start anew")
    return None


def is_whole(folder: Path, step: int, damaged: Iterable[Path] = ()) -> bool:
    if step_folder(folder, step) in damaged:
        return False
    try:
        _whole(step_folder(folder, step))
    except CheckpointError:
        return False
    return True


def start_saving(folder: Path, step: int) -> Path:
    """An empty folder to write the step's checkpoint in; leftovers of crashed saves are removed.

    Its name is new each time: what still runs of a crashed attempt cannot write into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    aside = folder / f"{_SAVING}{step_folder(folder, step).name}-{secrets.token_hex(4)}"
    aside.mkdir()
    return aside


def commit(aside: Path, folder: Path, manifest: Manifest) -> Path:
    """Makes what was written aside a whole checkpoint, durably.

    Other files than torch's metadata must be on disk already (its writer sees to that). Digests
    that the manifest lacks are added.
    """
    # torch syncs its metadata before the last of it has left the buffer.
    _sync(aside / METADATA)
    digests = {n: manifest.digests.get(n) or digest_of(aside / n) for n in manifest.files}
    manifest = replace(manifest, digests=digests)
    manifest = replace(manifest, digest=manifest.own_digest())
    with open(aside / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file)
        file.flush()
        os.fsync(file.fileno())
    _sync(aside)
    checkpoint = step_folder(folder, manifest.step)
    if checkpoint.exists():  # not whole, or nobody would save this step again
        _remove(checkpoint)
    aside.rename(checkpoint)
    _sync(folder)
    _sync(folder.parent)
    return checkpoint


def prune(folder: Path, *, keep: int, relied_on: Path, damaged: Iterable[Path] = ()) -> None:
    """Leaves `keep` whole checkpoints: `relied_on` and the newest others, `damaged` ones apart.

    What cannot be removed is logged and tried again after the next save.
    """
    others = [c for c in _named(folder) if c != relied_on and is_whole(folder, _step(c), damaged)]
    for checkpoint in others[: max(0, len(others) - (keep - 1))]:
        try:
            _remove(checkpoint)
        except OSError as error:
            log.warning("cannot remove the old checkpoint %s: %s", checkpoint, error)


def remove_leftovers(folder: Path) -> None:
    """Removes what crashed saves and removals left. Only for the one process that writes here."""
    for path in list(folder.glob(f"{_SAVING}*")) + list(folder.glob(f"{_DELETING}*")):
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("cannot remove %s, a leftover of an earlier run: %s", path, error)


def _named(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, by step."""
    found = [path for path in _entries(folder) if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _whole(checkpoint: Path) -> Manifest:
    manifest = read_manifest(checkpoint)
    if manifest.step != _step(checkpoint):
        raise CheckpointError(f"{checkpoint} holds step {manifest.step}; rename it to fit")
    return manifest


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: a checkpoint that is half removed must not look whole."""
    doomed = checkpoint.with_name(f"{_DELETING}{checkpoint.name}-{secrets.token_hex(4)}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some do not sync folders
            raise
    finally:
        os.close(descriptor)
