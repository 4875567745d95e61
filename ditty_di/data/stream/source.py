"""Iterable datasets of files or of the Hugging Face Hub, whose examples are read when needed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.data import options
from ditty_di.data.reading.files import kind_of
from ditty_di.data.reading.remote import is_url
from ditty_di.data.tokenization.sources import TextFiles
from ditty_di.protocols import early_checks

if TYPE_CHECKING:
    from datasets import IterableDataset

#: How `datasets` calls what reads a kind of file.
_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")

FilePath = str | os.PathLike[str] | Sequence[str]


def _validate(*, path: Any = ...) -> None:
    known = isinstance(path, str | list | os.PathLike)
    if known and not is_url(path) and not _on_hub(path):
        try:
            _files(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"path={path!r}: {error}") from error


@early_checks(validate=_validate)
def iterable_dataset(
    path: FilePath,
    *,
    name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    **arguments: Any,
) -> IterableDataset:
    """Return a dataset that is read in sequence, by `datasets` with `streaming=True`.

    Files come in the order of their names. A `.txt` file has an example a line, under `text`.

    Args:
        path: A file, a folder, a pattern, the URL of one, such as `s3://bucket/parts/*.jsonl`, a
            list of these, or the name of a dataset on the Hugging Face Hub (`org/name`).
        name: Configuration of a dataset on the Hub.
        revision: Branch, tag or commit of a dataset on the Hub.
        split: Split of a dataset on the Hub.
        **arguments: Further arguments of `datasets.load_dataset`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: Files of several kinds, or of one that is not known.
        ImportError, PermissionError, ConnectionError: Of a URL, see `remote.explained`.
    """
    import datasets

    arguments["streaming"] = True
    if _on_hub(path):
        try:
            return datasets.load_dataset(
                str(path), name, split=split, revision=revision, **arguments
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise FileNotFoundError(
                f"no text at path={path}: there is no such file or folder, and as a dataset of the "
                f"Hugging Face Hub it cannot be read ({error})"
            ) from error
    kind, files = _files(path)
    return datasets.load_dataset(kind, data_files=files, split="train", **arguments)


def _on_hub(path: FilePath) -> bool:
    return (
        isinstance(path, str)
        and _ON_HUB.fullmatch(path) is not None
        and not Path(path).expanduser().exists()
    )


def _files(path: FilePath) -> tuple[str, list[str]]:
    """Return what reads the files of a path, and the files."""
    found = [file.path for file in TextFiles(path).files()]
    kinds = sorted({kind_of(file) for file in found})
    options.require(
        len(kinds) == 1 and kinds[0] in _FORMATS,
        f"{path}: files of {', '.join(kinds)}; a stream has one kind of {', '.join(_FORMATS)}, "
        "compressed or not: give a pattern",
    )
    return _FORMATS[kinds[0]], [str(file) for file in found]
