"""The manifest of a checkpoint: what was written, with sizes and digests."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


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
        objective: the loss of a validation at this very step, finite; None without one.
    """

    step: int
    world_size: int
    torch: str
    files: dict[str, int]
    keys: list[str]
    digests: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    objective: float | None = None

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Return the manifest that a file holds.

        Args:
            content: of the file.

        Raises:
            TypeError, AttributeError: it is JSON but not a manifest.
            ValueError: it is not JSON.
        """
        manifest = cls(**json.loads(content))
        manifest.files.items(), manifest.digests.items()
        return manifest

    def dump(self) -> str:
        """Return the content of the file."""
        return json.dumps(self._fields())

    def own_digest(self) -> str:
        """Return the SHA-256 of the manifest without its field `digest`."""
        content = json.dumps(self._fields() | {"digest": ""}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _fields(self) -> dict[str, object]:
        fields = asdict(self)
        if self.objective is None:  # as before there was the field: digests remain
            del fields["objective"]
        return fields


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint, such as `step-00000100`.

    Args:
        step: optimizer steps done.
    """
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's name, None for any other name.

    Args:
        name: of a folder.
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


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
