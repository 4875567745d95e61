"""`manifest.json` of a folder of shards: what they hold, and the tokenizer that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditty_di.data.reading.remote import RemoteFile, is_url
from ditty_di.io import fsync, replacing

NAME = "manifest.json"
FORMAT = "ditty_di shards 1"


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a manifest: the files `NAME.bin` and `NAME.idx`.

    Attributes:
        name: Name of the files without suffix.
        split: `train`, `validation`, ...
        documents: Number of documents.
        tokens: Number of tokens.
        dtype: NumPy's name of the token type, `<u2` or `<i4`.
        sha256: SHA-256 of the `.bin` file.
    """

    name: str
    split: str
    documents: int
    tokens: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        key: Digest of everything that determines the shards' bytes.
        tokenizer: Digest of the tokenizer, `ditty_di.data.tokens.tokenizer_fingerprint`.
        vocab_size: Number of ids of the tokenizer; every token is below it.
        eos: Id that ends each document; None: documents have no end token.
        validation: Fraction of the documents that is held out.
        shards: The shards, in their order.
        format: Name and version of the format.
    """

    key: str
    tokenizer: str
    vocab_size: int
    eos: int | None
    validation: float
    shards: tuple[Shard, ...]
    format: str = FORMAT

    @property
    def tokens(self) -> dict[str, int]:
        """Number of tokens of each split."""
        found: dict[str, int] = {}
        for shard in self.shards:
            found[shard.split] = found.get(shard.split, 0) + shard.tokens
        return found

    def of_split(self, split: str) -> list[Shard]:
        """Return the shards of a split.

        Raises:
            ValueError: No manifest is given.
        """
        if found := [shard for shard in self.shards if shard.split == split]:
            return found
        raise ValueError(f"no shards of the split {split!r}: there are {[*self.tokens]}")

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `manifest.json`, whole or not at all, one line a shard."""
        names = ("format", "key", "tokenizer", "vocab_size", "eos", "validation", "tokens")
        head = {name: getattr(self, name) for name in names}
        lines = ",\n  ".join(json.dumps(dataclasses.asdict(shard)) for shard in self.shards)
        text = f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n  {lines}\n ]\n}}\n'
        with replacing(Path(folder) / NAME) as path:
            path.write_text(text, encoding="utf-8")
            fsync(path)
        fsync(Path(folder))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read `manifest.json` of a folder, on this machine or remote.

        Raises:
            FileNotFoundError: The folder has none.
            ValueError: It is damaged, or of another format.
            ImportError, PermissionError, ConnectionError: See `remote.explained`.
        """
        path = f"{str(folder).rstrip('/')}/{NAME}"
        try:
            file = RemoteFile(path, 0) if is_url(folder) else Path(path)
            found: Any = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is missing: the folder has no shards, or they are not finished"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            kind = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{path}: format {kind!r}, expected {FORMAT!r}")
        try:
            tokens = found.pop("tokens")
            shards = tuple(Shard(**shard) for shard in found.pop("shards"))
            made = cls(**found, shards=shards)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        if tokens != made.tokens:
            raise ValueError(f"{path}: tokens {tokens}, but its shards have {made.tokens}")
        return made

    def check(self, folder: str | os.PathLike[str]) -> list[str]:
        """Return what is wrong with the shards' files: missing, of another size or content."""
        problems = []
        for shard in self.shards:
            path = Path(folder) / f"{shard.name}.bin"
            size = shard.tokens * np.dtype(shard.dtype).itemsize
            if not path.is_file() or not path.with_name(f"{shard.name}.idx").is_file():
                problems.append(f"{path}: this file or its .idx is missing")
            elif (found := path.stat().st_size) != size:
                problems.append(f"{path}: {found} bytes, expected {size}")
            elif (digest := file_sha256(path)) != shard.sha256:
                problems.append(f"{path}: SHA-256 {digest[:12]}, expected {shard.sha256[:12]}")
        return problems

    def require_tokenizer(self, digest: str, folder: str | os.PathLike[str]) -> None:
        """Raise `ValueError` unless the shards were made by the tokenizer of this digest."""
        if digest != self.tokenizer:
            raise ValueError(
                f"{folder}/{NAME}: tokenizer {self.tokenizer[:12]} made these shards, the "
                f"run's tokenizer is {digest[:12]}: take that tokenizer, or tokenize the text again"
            )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
