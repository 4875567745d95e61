"""Checkpoints on disk: the folder that holds them, and reading one of them.

    .saving-step-00000200-1f3a/   being written; not read
    step-00000100/                whole: it got its name after everything in it was on disk
      manifest.json               written last: step, world size, keys, files with sizes and digests
      .metadata  __0_0.distcp ... torch.distributed.checkpoint's own
    .deleting-step-00000050/      being removed; not read

Renaming is the only thing that makes or unmakes a checkpoint, so a process that dies at any moment
leaves whole checkpoints and leftovers with a leading dot.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ditty_di.checkpoint.restricted import Planner, Reader
from ditty_di.io import fsync

log = logging.getLogger(__name__)

MANIFEST, METADATA = "manifest.json", ".metadata"
_NAME = re.compile(r"step-(\d{8,})")
_SAVING, _DELETING = ".saving-", ".deleting-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; every rank raises it."""


@dataclass(frozen=True)
class Manifest:
    """Description of a whole checkpoint.

    Args:
        step: optimizer steps done.
        world_size: number of ranks that saved it.
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
        """Return the SHA-256 of the manifest without its field `digest`."""
        content = json.dumps(asdict(replace(self, digest="")), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class Checkpoint:
    """A whole checkpoint, opened for reading.

    Args:
        path: its folder, such as `.../step-00000100`.

    Raises:
        CheckpointError: it is not whole; the message says why.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST
        try:
            content: Any = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            problem = f"has no {MANIFEST}" if self.path.is_dir() else "is not a folder"
            raise CheckpointError(f"{self.path} {problem}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        try:
            self.manifest = Manifest(**content)
            sizes, _ = self.manifest.files.items(), self.manifest.digests.items()
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a manifest: {error}") from error
        for name, size in sizes:
            try:
                found = (self.path / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.path / name} is missing: {error.strerror}") from error
            if found != size:
                raise CheckpointError(f"{self.path / name} has {found} bytes instead of {size}")

    @classmethod
    def find(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint, or the newest undamaged one in a folder of checkpoints.

        Args:
            path: a checkpoint's folder (`.../step-00000100`), or a folder of them.

        Raises:
            CheckpointError: there is no whole checkpoint, or the one given is damaged.
        """
        path = Path(path).expanduser()
        if (path / MANIFEST).exists():
            checkpoint = cls(path)
            if problem := checkpoint.damage():
                raise CheckpointError(problem)
            return checkpoint
        damaged: dict[Path, str] = {}
        while (newest := latest(path, damaged)) is not None:
            checkpoint = cls(newest)
            if (problem := checkpoint.damage()) is None:
                return checkpoint
            pass_over_damaged(newest, problem, damaged)
        problem = "holds no whole checkpoint" if path.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{path} {problem}; give a folder with step-00000100/ and so on in it, or one of those"
        )

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.manifest.step

    def damage(self, names: Iterable[str] | None = None) -> str | None:
        """Compare the content of files with the digests in the manifest.

        A checkpoint of an earlier version has no digests and passes.

        Args:
            names: the files to compare, None for all.

        Returns:
            A message about the first file with other content than was written, None without one.
        """
        manifest, damaged = self.manifest, None
        if manifest.digest and manifest.digest != manifest.own_digest():
            damaged = MANIFEST
        for name in manifest.digests if names is None else names:
            try:
                if damaged is None and digest_of(self.path / name) != manifest.digests[name]:
                    damaged = name
            except OSError as error:
                return str(error)
        return damaged and (
            f"{self.path / damaged} is damaged: its content has another digest than when it was "
            f"written"
        )

    @cached_property
    def entries(self) -> dict[str, dict[str, Tensor | None]]:
        """Entries by state and key: a tensor on meta (shape and dtype), None for a pickled one."""
        saved: dict[str, dict[str, Tensor | None]] = {}
        for name, entry in Reader(self.path).read_metadata().state_dict_metadata.items():
            state, _, key = name.partition(".")
            saved.setdefault(state, {})[key] = (
                torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                if isinstance(entry, TensorStorageMetadata)
                else None
            )
        return saved

    def read(self, targets: dict[str, Any], *, group: Any = None) -> None:
        """Fill `targets` in place: tensors with this rank's values, None with pickled bytes.

        Args:
            targets: by state and key.
            group: a process group whose ranks read together; None reads alone.
        """
        reader, planner = Reader(self.path), Planner()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(
                targets,
                storage_reader=reader,
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file; a file that did not change is read once per process.

    Args:
        file: its path.
    """
    status = file.stat()
    return _digest_of(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_of(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def pass_over_damaged(checkpoint: Path, problem: str, damaged: dict[Path, str]) -> None:
    """Log and note that a checkpoint is damaged.

    Args:
        checkpoint: its folder.
        problem: what is damaged.
        damaged: where it is noted.
    """
    log.warning("passing over a checkpoint that is damaged: %s", problem)
    damaged[checkpoint] = problem


def latest(folder: str | Path, damaged: Mapping[Path, str] = MappingProxyType({})) -> Path | None:
    """Return the newest whole checkpoint, None without any; newer incomplete ones are logged.

    Args:
        folder: the folder of checkpoints.
        damaged: checkpoints to pass over, and why.

    Raises:
        CheckpointError: there are checkpoints but none is whole. A crashed save does not leave
            that, and starting anew would throw the training away.
    """
    first_problem: str | None = None
    for path in reversed(_named(Path(folder))):
        problem = damaged.get(path)
        if problem is None:
            if (problem := _incomplete(path)) is None:
                return path
            log.warning("passing over a checkpoint that is not whole: %s", problem)
        first_problem = first_problem or problem
    if first_problem is not None:
        hint = "move it away to start anew"
        raise CheckpointError(f"no checkpoint is whole: {first_problem}; {hint}")
    return None


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint.

    Args:
        folder: the folder of checkpoints.
        step: optimizer steps done.
    """
    return folder / f"step-{step:08d}"


def is_whole(folder: Path, step: int, damaged: Container[Path] = ()) -> bool:
    """Return whether the checkpoint of a step is complete and not damaged.

    Args:
        folder: the folder of checkpoints.
        step: optimizer steps done.
        damaged: checkpoints known to be damaged.
    """
    path = step_folder(folder, step)
    return path not in damaged and _incomplete(path) is None


def start_saving(folder: Path, step: int) -> Path:
    """Return an empty folder to write a checkpoint in; leftovers of crashed saves are removed.

    Its name is new each time: a process left over from a crashed save cannot write into it.

    Args:
        folder: the folder of checkpoints.
        step: optimizer steps done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = folder / f"{_SAVING}{step_folder(folder, step).name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def commit(temporary: Path, folder: Path, manifest: Manifest) -> Path:
    """Make a written folder a whole checkpoint, durably, and return its path.

    Other files than torch's metadata must be on disk already (torch's writer flushes them).

    Args:
        temporary: what `start_saving` returned, with all files but the manifest.
        folder: the folder of checkpoints.
        manifest: its missing digests are added.
    """
    # torch flushes its metadata to disk before the last of it has left the buffer.
    fsync(temporary / METADATA)
    digests = {n: manifest.digests.get(n) or digest_of(temporary / n) for n in manifest.files}
    manifest = replace(manifest, digests=digests)
    manifest = replace(manifest, digest=manifest.own_digest())
    with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file)
        file.flush()
        os.fsync(file.fileno())
    fsync(temporary)
    checkpoint = step_folder(folder, manifest.step)
    if checkpoint.exists():  # incomplete or damaged, or this step would not be saved again
        _remove(checkpoint)
    temporary.rename(checkpoint)
    fsync(folder)
    fsync(folder.parent)
    return checkpoint


def prune(folder: Path, *, keep: int, relied_on: Path, damaged: Container[Path] = ()) -> None:
    """Leave `keep` whole checkpoints; log what cannot be removed.

    Args:
        folder: the folder of checkpoints.
        keep: how many remain: `relied_on` and the newest others.
        relied_on: a checkpoint that remains whatever its step.
        damaged: checkpoints that are neither counted nor removed.
    """
    others = [c for c in _named(folder) if c != relied_on and is_whole(folder, _step(c), damaged)]
    for checkpoint in others[: max(0, len(others) - (keep - 1))]:
        try:
            _remove(checkpoint)
        except OSError as error:
            log.warning("cannot remove the old checkpoint %s: %s", checkpoint, error)


def remove_leftovers(folder: Path) -> None:
    """Remove what crashed saves and removals left. Only for the one process that writes here.

    Args:
        folder: the folder of checkpoints.
    """
    for path in [*folder.glob(f"{_SAVING}*"), *folder.glob(f"{_DELETING}*")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("cannot remove %s, a leftover of an earlier run: %s", path, error)


def _named(folder: Path) -> list[Path]:
    """Return the paths with the name of a checkpoint, by step."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _incomplete(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not whole, None when it is."""
    try:
        step = Checkpoint(checkpoint).step
    except CheckpointError as error:
        return str(error)
    fits = step == _step(checkpoint)
    return None if fits else f"{checkpoint} holds step {step}; rename it to fit"


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; its name first, as half of it must not look whole."""
    doomed = checkpoint.with_name(f"{_DELETING}{checkpoint.name}-{secrets.token_hex(4)}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
