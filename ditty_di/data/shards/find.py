"""From a path to the files of token ids there, in a fixed order."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ditty_di.data.reading.file_cache import FileCache
from ditty_di.data.reading.remote import is_url
from ditty_di.data.shards import manifest
from ditty_di.data.shards.files import (
    DatatroveFile,
    MegatronFile,
    NumpyFile,
    ShardFile,
    TokenFile,
)
from ditty_di.data.shards.manifest import Manifest
from ditty_di.data.shards.megatron import add_suffix
from ditty_di.data.shards.remote import RemoteShard

#: dtt's names, `{rank}_{split}__{number}`; its validation split is `val`.
_DTT = re.compile(r"\d+_(?P<split>[a-z]+)__\d{6}")
_DTT_SPLITS = {"val": "validation"}

#: A path, or a file that `shard_file` has opened.
ShardPath = str | os.PathLike[str] | ShardFile


def find_shards(
    path: ShardPath | Sequence[ShardPath],
    split: str = "train",
    eos: int | None = None,
    cache: FileCache | None = None,
) -> tuple[list[ShardFile], Manifest | None]:
    """Return the files of a split, and the manifest of a folder that has one.

    Args:
        path: A folder of shards, one file (`x.bin`, or Megatron's prefix `x`; `x.ds`; a `.npy`
            file), the URL of a folder with a manifest, or a list of these.
        split: Files without a manifest and without dtt's names are all of the split `train`.
        eos: Id that ends a document in `.npy` files.
        cache: Where shards of a URL are fetched to; None: a `FileCache()`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The folder has no shards of the split.
    """
    if isinstance(path, ShardFile):
        return [path], None
    if not isinstance(path, str | os.PathLike):
        each = [find_shards(one, split, eos, cache)[0] for one in path]
        return [shard for shards in each for shard in shards], None
    if is_url(path):
        return _remote(str(path), split, cache or FileCache())
    root = Path(path).expanduser()
    if (root / manifest.NAME).exists():
        found = Manifest.read(root)
        shards, folder = found.of_split(split), f"{root}{os.sep}"
        return [
            ShardFile(folder + shard.name, MegatronFile, shard.tokens, in_file=shard.tokens)
            for shard in shards
        ], found
    files = sorted(root.iterdir()) if root.is_dir() else [_one(root)]
    splits: dict[str, list[ShardFile]] = {}
    for file in files:
        if (reader := _reader(file, eos)) is None:
            continue
        name = _DTT.fullmatch(file.name)
        of = name["split"] if name else "train"
        prefix = file.with_suffix("") if reader is MegatronFile else file
        splits.setdefault(_DTT_SPLITS.get(of, of), []).append(shard_file(prefix, reader))
    if split not in splits:
        raise ValueError(
            f"{root}: no shards of the split {split!r} (.bin with .idx, .ds, .npy): there are "
            f"{[*splits]}, and no {manifest.NAME} says otherwise"
        )
    return splits[split], None


def _remote(url: str, split: str, cache: FileCache) -> tuple[list[ShardFile], Manifest | None]:
    """Return the files of a remote folder, whose digests its manifest has."""
    try:
        found = Manifest.read(url)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; remote shards need one: without its digests none could be told from a half "
            "one"
        ) from error
    return [
        ShardFile(
            Path(shard.name), RemoteShard(url, shard, cache), shard.tokens, in_file=shard.tokens
        )
        for shard in found.of_split(split)
    ], found


def shard_file(
    path: Path,
    reader: Callable[[Path], TokenFile] = MegatronFile,
    between: tuple[float, float] = (0.0, 1.0),
) -> ShardFile:
    """Return a file without a manifest, or a part of its documents.

    Args:
        path: Argument of the reader.
        reader: Opens it.
        between: First and last document, as fractions of their number, rounded to whole ones.
    """
    file = reader(path)
    try:
        start, stop = 0, file.tokens
        if between != (0.0, 1.0):
            if not isinstance(file, MegatronFile):
                raise ValueError(f"{path}: a part of the documents needs an .idx file")
            index = file.index
            first, last = (round(fraction * index.documents) for fraction in between)
            begins = np.append(index.document_starts(0, file.tokens), file.tokens)
            start, stop = int(begins[first]), int(begins[last])
        return ShardFile(path, reader, stop - start, start)
    finally:
        file.close()


def _one(path: Path) -> Path:
    """Return the file that a path means: itself, or the `.bin` of Megatron's prefix."""
    if path.is_file():
        return path
    payload = add_suffix(path, ".bin")
    if not payload.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder, and no {payload.name}")
    return payload


def _reader(path: Path, eos: int | None) -> Callable[[Path], TokenFile] | None:
    """Return what reads a file; None for any other file."""
    if path.suffix == ".bin":
        if not path.with_suffix(".idx").is_file():
            raise ValueError(f"{path}: its index {path.stem}.idx is missing")
        return MegatronFile
    if path.suffix == ".ds":
        if not add_suffix(path, ".index").is_file():
            raise ValueError(f"{path}: its index {path.name}.index is missing")
        return DatatroveFile
    if path.suffix == ".npy" or _DTT.fullmatch(path.name):
        return partial(NumpyFile, eos=eos)
    return None
