"""Begin and end a tokenization: whose folder it is, what is missing, and the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditty_di.data.shards.manifest import Manifest, Shard
from ditty_di.data.tokenization.part import RECEIPTS, Job, Receipt, Totals
from ditty_di.data.tokenization.plan import Part, key_of
from ditty_di.io import read_json, write_json
from ditty_di.messages import readable

#: File with the options that the folder was begun with.
SETTINGS = "settings.json"


class UnfinishedError(RuntimeError):
    """Parts are missing, so the manifest cannot be written."""


def begin(folder: Path, settings: dict[str, Any]) -> str:
    """Make the folder of a tokenization, or go on with it; return its key.

    Raises:
        ValueError: It was begun with other input or settings, or holds something else.
    """
    file = folder / SETTINGS
    found = read_json(file)
    if found is None:
        # Other ranks may be beginning too.
        ours = (RECEIPTS, SETTINGS, ".")
        if folder.is_dir() and any(not p.name.startswith(ours) for p in folder.iterdir()):
            raise ValueError(f"{folder} holds other files: give another folder, data.shards=FOLDER")
        (folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        found = read_json(file)
    (folder / RECEIPTS).mkdir(exist_ok=True)
    if changed := [name for name in settings if settings[name] != found.get(name)]:
        differences = ", ".join(f"{n}={found.get(n)!r} (now {settings[n]!r})" for n in changed)
        raise ValueError(
            f"{folder} was begun with {differences}: give another folder, data.shards=FOLDER, or "
            "delete this one"
        )
    return key_of(settings)


def missing(folder: Path, parts: Sequence[Part]) -> list[int]:
    """Return the numbers of the parts without a receipt."""
    done = {entry.name for entry in os.scandir(folder / RECEIPTS)}
    return [part.number for part in parts if f"{part.number:06d}.json" not in done]


def require_space(folder: Path, parts: Sequence[Part], bytes_per_token: float, size: int) -> None:
    """Refuse to begin where the shards will not fit.

    Args:
        folder: Folder of the shards.
        parts: Parts that are still to do.
        bytes_per_token: Of the text.
        size: Bytes of a token id.

    Raises:
        OSError: The disk has not enough space.
    """
    text = sum(part.size for part in parts)
    needed = text / max(bytes_per_token, 1.0) * size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: about {readable(needed)} to write for {readable(text)} of text, and "
            f"{readable(free)} of free space; give a folder on a larger disk, data.shards=FOLDER"
        )


def finish(
    job: Job, parts: Sequence[Part], tokenizer: str, check: bool = False
) -> tuple[Manifest, Totals]:
    """Write the manifest from the receipts, once all are there.

    Several ranks may do it at once: they write the same bytes.

    Args:
        job: The tokenization.
        parts: All its parts.
        tokenizer: Digest of the tokenizer.
        check: Hash all shards again.

    Raises:
        UnfinishedError: Receipts are missing.
        ValueError: No documents; with `check`, a shard that is not what its receipt says.
    """
    if left := missing(job.folder, parts):
        raise UnfinishedError(f"{len(left)} of {len(parts)} parts are missing")
    receipts = [Receipt.read(job.receipt(part)) for part in parts]
    found = [receipt for receipt in receipts if receipt is not None and receipt.key == job.key]
    if len(found) < len(parts):
        raise ValueError(f"{job.folder / RECEIPTS}: damaged; delete this folder to tokenize again")
    shards = tuple(Shard(**shard) for receipt in found for shard in receipt.shards)
    if not shards:
        raise ValueError(f"{job.folder}: no documents: looked for text that is not empty")
    manifest = Manifest(
        key=job.key,
        tokenizer=tokenizer,
        vocab_size=job.vocab_size,
        eos=job.eos,
        validation=job.validation_fraction,
        shards=shards,
    )
    if check and (problems := manifest.check(job.folder)):
        raise ValueError("\n".join([f"{len(problems)} damaged shards:", *problems[:20]]))
    manifest.write(job.folder)
    totals = Totals()
    for receipt in found:
        totals.add(receipt)
    return manifest, totals
