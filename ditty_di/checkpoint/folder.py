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

import logging
import secrets
import shutil
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ditty_di.checkpoint import remote
from ditty_di.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    digest_of,
    folder_name,
    step_of,
)
from ditty_di.checkpoint.restricted import Planner, Reader
from ditty_di.checkpoint.retention import BEST, Retention, best_step
from ditty_di.data.reading.remote import is_url
from ditty_di.io import fsync

log = logging.getLogger(__name__)

METADATA = ".metadata"
_SAVING, _DELETING = ".saving-", ".deleting-"


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
            self.manifest = Manifest.parse(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            problem = f"has no {MANIFEST}" if self.path.is_dir() else "is not a folder"
            raise CheckpointError(f"{self.path} {problem}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a manifest: {error}") from error
        for name, size in self.manifest.files.items():
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
            path: a checkpoint's folder (`.../step-00000100`), or a folder of them; `FOLDER/best` is
                the one with the lowest objective. The same as a URL (`s3://bucket/checkpoints`):
                it is fetched into the cache of this machine.

        Raises:
            CheckpointError: there is no whole checkpoint, or the one given is damaged.
        """
        if is_url(path):
            return cls(remote.cached(str(path)))
        path = Path(path).expanduser()
        if path.name == BEST and not path.exists():
            path = best(path.parent)
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
            f"{path} {problem}; give a folder with step-00000100/ and so on in it, one of those, "
            f"or the URL of either, as of checkpoint.mirror"
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
        ValueError: the folder is a URL.
    """
    if is_url(folder):
        raise ValueError(
            f"latest({folder}) looks at folders of this machine; Checkpoint.find({str(folder)!r}) "
            f"fetches the newest checkpoint there and has its step and path"
        )
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


def best(folder: str | Path) -> Path:
    """Return the whole checkpoint with the lowest objective; of equal ones the earliest.

    Args:
        folder: the folder of checkpoints.

    Raises:
        CheckpointError: no checkpoint was saved at a step that was validated.
    """
    objectives = {
        step: checkpoint.manifest.objective for step, checkpoint in whole(Path(folder)).items()
    }
    return step_folder(Path(folder), best_step(objectives, folder))


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint.

    Args:
        folder: the folder of checkpoints.
        step: optimizer steps done.
    """
    return folder / folder_name(step)


def is_whole(folder: Path, step: int, damaged: Container[Path] = ()) -> bool:
    """Return whether the checkpoint of a step is complete and not damaged.

    Args:
        folder: the folder of checkpoints.
        step: optimizer steps done.
        damaged: checkpoints known to be damaged.
    """
    path = step_folder(folder, step)
    return path not in damaged and _incomplete(path) is None


def whole(folder: Path, damaged: Container[Path] = ()) -> dict[int, Checkpoint]:
    """Return the checkpoints that are complete and not damaged, by step.

    Args:
        folder: the folder of checkpoints.
        damaged: checkpoints known to be damaged.
    """
    steps = [_step(path) for path in _named(folder)]
    return {
        step: Checkpoint(step_folder(folder, step))
        for step in steps
        if is_whole(folder, step, damaged)
    }


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
    (temporary / MANIFEST).write_text(manifest.dump(), encoding="utf-8")
    fsync(temporary / MANIFEST)
    fsync(temporary)
    return rename(temporary, folder, manifest.step)


def rename(temporary: Path, folder: Path, step: int) -> Path:
    """Give a complete checkpoint, which is on disk, its name, and return its path.

    Args:
        temporary: its folder.
        folder: the folder of checkpoints.
        step: optimizer steps done.
    """
    checkpoint = step_folder(folder, step)
    if checkpoint.exists():  # incomplete or damaged, or this step would not be saved again
        remove(checkpoint)
    temporary.rename(checkpoint)
    fsync(folder)
    fsync(folder.parent)
    return checkpoint


def prune(
    folder: Path,
    *,
    keep: Retention,
    relied_on: Path,
    damaged: Container[Path] = (),
    in_use: Path | None = None,
) -> None:
    """Remove the whole checkpoints that no rule keeps; log what cannot be removed.

    Args:
        folder: the folder of checkpoints.
        keep: which remain.
        relied_on: a checkpoint that counts as the newest, whatever its step is.
        damaged: checkpoints that are neither counted nor removed.
        in_use: one that is not removed now.
    """
    objectives = {s: found.manifest.objective for s, found in whole(folder, damaged).items()}
    for step in sorted(objectives.keys() - keep.kept(objectives, _step(relied_on))):
        old = step_folder(folder, step)
        try:
            if old != in_use:
                remove(old)
        except OSError as error:
            log.warning("cannot remove the old checkpoint %s: %s", old, error)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; its name first, as half of it must not look whole.

    Args:
        checkpoint: its folder.
    """
    doomed = checkpoint.with_name(f"{_DELETING}{checkpoint.name}-{secrets.token_hex(4)}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


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
    named = (path for path in folder.glob("step-*") if step_of(path.name) is not None)
    return sorted(named, key=_step)


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
