"""Datasets of records by split: from files and folders, and from Hugging Face datasets."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditty_di.data import options
from ditty_di.data.cache import fingerprint
from ditty_di.data.reading.files import (
    COMPRESSED,
    READERS,
    ROWS_AT_ONCE,
    as_record,
    first_bytes,
    has_several,
    is_data_file,
    kind_of,
    located,
    name_of,
    read_values,
    require_records,
    table_rows,
)
from ditty_di.data.reading.splits import content_hash, threshold
from ditty_di.protocols import early_checks

log = logging.getLogger(__name__)

#: Names that a split may have in a folder or dataset, the usual one first.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
#: Fraction of the training split that is held out where there is no validation split.
VALIDATION_FRACTION = 0.05

_NO_VALIDATION = """\
, or let validation_fraction be above 0 to hold out a part of the training split, or train without \
validation: validator=none"""
_ONLY_RECORD = """\
nothing can be held out of {name}: it has no two different records, and one is for training. Add \
records or a validation split, or train without validation: validator=none"""
_EMPTY = """\
no records in {name}: write one JSON object a line, such as {{"input": "...", "output": "..."}}"""
_NO_SOURCE = """\
no examples at {path!r}: there is no such file or folder{hub}. Expected a folder with \
train/*.jsonl or train.jsonl, a file of records ({suffixes}), a list or pattern of them, a folder \
written by `save_to_disk`, or the name of a dataset on the Hugging Face Hub."""
_NOT_IN_FOLDER = """\
no examples in {folder}: looked for train/*.jsonl, train.jsonl and *.jsonl (or any of {suffixes}), \
and found {found}"""
_SUFFIXES = ", ".join(READERS)
_FILES_CHECKED = 20  # files whose first bytes are read by `validate`


@dataclass(frozen=True)
class RecordDataset:
    """A dataset of the records of one split, read anew by each iteration.

    It iterates over pairs (position, record). In place of a line that is not a JSON object comes
    the exception that says so.

    Attributes:
        read: Returns an iterator over the pairs.
        fingerprint: Returns a digest of the content.
        if_empty: Error message for a dataset without records.
    """

    read: Callable[[], Iterator[tuple[str, Any]]]
    fingerprint: Callable[[], str]
    if_empty: str = _EMPTY.format(name="the source of examples")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self.read()


def _validate(
    *,
    path: Any = ...,
    split: str = "train",
    validation_fraction: float | None = None,
) -> None:
    options.one_of(SPLITS, split=split)
    options.fraction(validation_fraction=validation_fraction)
    if not isinstance(path, str | list | os.PathLike | None):  # not known before it is built
        return
    if isinstance(path, str) and _is_saved_dataset(Path(path).expanduser()):
        return  # reading it imports much
    about = f"path={path!r}"
    try:
        source = _local(path)
        for file in source.files[:_FILES_CHECKED] if source else ():
            require_records(file, first_bytes(file))
    except (OSError, ValueError) as error:
        if split != "train":  # reported for the training split already
            return
        text = str(error)
        raise ValueError(text if text.startswith("path=") else f"{about}: {text}") from error
    try:
        if source is not None:
            _choose(source, split, validation_fraction)
    except ValueError as error:
        if split == "validation" and validation_fraction == 0:
            about = "validation_fraction=0"
        raise ValueError(f"{about}: {error}") from error


@early_checks(validate=_validate)
def records(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    split: str = "train",
    *,
    validation_fraction: float | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> RecordDataset:
    """Return the records of one split of a source of examples.

    Where .jsonl is written, .json (a list of objects, or one a line), .csv, .tsv and .parquet do as
    well, all but the last also compressed (.gz, .bz2, .xz, .zst): see `files.read_values`. Of a
    file that exists both compressed and not, the latter is read. Class labels of a dataset become
    their names, hidden ones (-1) None.

    Args:
        path: One of

            - a folder with `train/ val/ test/*.jsonl`, or `train.jsonl val.jsonl test.jsonl` (also
              `validation`), or else with .jsonl files that are all for training;
            - one .jsonl file, a list of them, or a pattern (`parts/*.jsonl`), all for training;
            - a dataset folder written by `datasets.Dataset.save_to_disk`;
            - the name of a dataset on the Hugging Face Hub (`org/name`).
        split: `train`, `validation` or `test`.
        validation_fraction: Fraction of the training split that is held out where there is no
            validation split, by the records' hashes (`splits.threshold`). None: 0.05; 0: nothing.
        name: Configuration of a dataset on the Hub.
        revision: Git revision of a dataset on the Hub.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: It has no such split.
    """
    options.one_of(SPLITS, split=split)
    options.fraction(validation_fraction=validation_fraction)
    source = _local(path) or _hub(str(path), name, revision)
    found, fraction = _choose(source, split, validation_fraction)
    return _part(found, fraction, source.name, split == "validation") if fraction else found


def in_memory(examples: Sequence[Mapping[str, Any]]) -> RecordDataset:
    """Return the records of a list of dicts."""
    return RecordDataset(
        lambda: ((f"example {i}", example) for i, example in enumerate(examples)),
        lambda: fingerprint(*map(_canonical, examples)),
        "no records: the list of examples is empty",
    )


def synthetic(
    num_examples: int,
    *,
    token_id: int | None = None,
    vocab_size: int = 256,
    tokenizer: Any = None,
    input_tokens: int = 64,
    output_tokens: int = 64,
    static: bool = True,
    seed: int = 0,
) -> RecordDataset:
    """Return records to debug with, each the same token id over and over.

    Args:
        num_examples: Number of records.
        token_id: The token of all records if `static`; None: 0.
        vocab_size: Upper bound of the random token ids; with a `tokenizer` its size.
        input_tokens: Length of the inputs, in tokens.
        output_tokens: Length of the outputs, in tokens.
        static: All records are equal; else each has one random token.
        tokenizer: A transformers tokenizer.
        seed: Seed of the random tokens.
    """
    vocab_size = vocab_size if tokenizer is None else len(tokenizer)
    ids = np.full(num_examples, token_id or 0)
    if not static:
        ids = np.random.default_rng(seed).integers(0, vocab_size, num_examples)
    return in_memory(
        [{"input": [i] * input_tokens, "output": [i] * output_tokens} for i in ids.tolist()]
    )


# --- where the records are -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    name: str
    splits: dict[str, RecordDataset]
    files: Sequence[Path] = ()
    is_folder: bool = False


def _choose(source: _Source, split: str, fraction: float | None) -> tuple[RecordDataset, float]:
    """Return the records of a split, and the fraction of them that is held out for validation.

    The fraction is 0 where the records are the split itself.
    """
    fraction = VALIDATION_FRACTION if fraction is None else fraction
    holds_out = split != "test" and fraction > 0 and "validation" not in source.splits
    wanted = "train" if holds_out else split
    if wanted not in source.splits:
        found, usual = " and ".join(source.splits) or "none", SPLITS[wanted][0]
        where = f"in a folder with train.jsonl and {usual}.jsonl"
        if source.is_folder:
            where = f"{source.name}/{usual}/*.jsonl or {source.name}/{usual}.jsonl"
        hint = _NO_VALIDATION if split == "validation" else ""
        raise ValueError(
            f"{source.name} has no {split} split: it has {found}. Add one ({where}){hint}."
        )
    return source.splits[wanted], fraction if holds_out else 0


def _local(path: Any) -> _Source | None:
    """Return the source at a path of this machine; None for what may be a name on the Hub."""
    options.require(
        path is not None, "path=None: give a folder, a file of records, or a dataset's name"
    )
    if not isinstance(path, str | os.PathLike):
        return _of_files([Path(p).expanduser() for p in path], f"the list of {len(path)} files")
    local = Path(path).expanduser()
    if local.is_file():
        return _of_files([local], str(local))
    if _is_saved_dataset(local):
        import datasets

        return _of_dataset(str(local), datasets.load_from_disk(str(local)))
    if local.is_dir():
        return _of_folder(local)
    if found := sorted(Path(p) for p in glob(str(local), recursive=True)):
        return _of_files([p for p in found if not p.is_dir()], f"the files {local}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or kind_of(local) in READERS:
        raise _not_found(path)
    return None


def _not_found(path: Any, hub: str = "") -> FileNotFoundError:
    return FileNotFoundError(_NO_SOURCE.format(path=str(path), hub=hub, suffixes=_SUFFIXES))


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _of_files(files: list[Path], name: str) -> _Source:
    return _Source(name, {"train": _records_of(files, name)}, files)


def _of_folder(folder: Path) -> _Source:
    top = _data_files(folder.glob("*"))
    splits: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        for name in names:
            files = [file for file in top if name_of(file) == name]
            if files := files + _data_files((folder / name).rglob("*")):
                splits.setdefault(split, []).extend(files)
    if not splits and top:
        # Beside records in .jsonl, a .json or .csv may have information about them.
        top = [file for file in top if kind_of(file) != ".json" or has_several(file)]
        kind = next((kind for kind in READERS if kind in map(kind_of, top)), "")
        splits["train"] = [file for file in top if kind_of(file) == kind]
        if left_out := [file.name for file in top if kind_of(file) != kind]:
            log.warning("%s: reads its %s files, not %s", folder, kind, ", ".join(left_out))
    if not any(splits.values()):
        others = sorted(path.name for path in folder.iterdir())
        found = f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" or "nothing"
        raise FileNotFoundError(
            _NOT_IN_FOLDER.format(folder=folder, found=found, suffixes=_SUFFIXES)
        )
    made = {split: _records_of(files, f"{folder} ({split})") for split, files in splits.items()}
    return _Source(str(folder), made, [f for files in splits.values() for f in files], True)


def _data_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of records, sorted; of a file that exists twice, not the compressed one."""
    found = {path for path in paths if is_data_file(path)}
    twins = {file for file in found if file.suffix in COMPRESSED and file.with_suffix("") in found}
    return sorted(found - twins)


def _records_of(files: list[Path], name: str) -> RecordDataset:
    options.require(bool(files), "path=[]: an empty list of files")
    for file in files:
        options.require(not file.is_dir(), f"{file} is a folder: a list holds files only")
        if not file.is_file():
            raise _not_found(file)

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            for where, value in read_values(file):
                try:
                    yield located(file, where), as_record(value)
                except ValueError as error:
                    yield located(file, where), error

    def content() -> str:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            if READERS.get(kind_of(file)) is not READERS[".json"]:  # the same bytes read otherwise
                digest.update(kind_of(file).encode())
        return digest.hexdigest()

    return RecordDataset(read, content, _EMPTY.format(name=name))


def _hub(path: str, name: str | None, revision: str | None) -> _Source:
    import datasets

    try:
        return _of_dataset(path, datasets.load_dataset(path, name, revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        reason = f", and as a dataset of the Hugging Face Hub it cannot be read ({error})"
        raise _not_found(path, reason) from error


def _of_dataset(name: str, found: Any) -> _Source:
    """Return the source of a `DatasetDict`, or of a `Dataset` that is all for training."""
    by_name = dict(found) if isinstance(found, dict) else {"train": found}
    splits = {
        split: _records_of_dataset(f"{name} {own}", by_name[own])
        for split, names in SPLITS.items()
        for own in names
        if own in by_name
    }
    return _Source(name, splits)


def _records_of_dataset(name: str, dataset: Any) -> RecordDataset:
    def read() -> Iterator[tuple[str, Any]]:
        # As Arrow has them, not decoded: images stay bytes and paths.
        tables = dataset.with_format("arrow").iter(ROWS_AT_ONCE)
        rows = table_rows(tables, dataset.features)
        return ((f"{name}, row {i}", row) for i, row in enumerate(rows))

    return RecordDataset(
        read,
        lambda: fingerprint(dataset._fingerprint, repr(dataset.features)),
        f"no records: the dataset {name} has no rows",
    )


# --- a part of the training split, held out ------------------------------------------------------


def _part(whole: RecordDataset, fraction: float, name: str, held_out: bool) -> RecordDataset:
    def read() -> Iterator[tuple[str, Any]]:
        limit = threshold((_hash(record) for _, record in whole), fraction)
        return (pair for pair in whole if (_hash(pair[1]) < limit) == held_out)

    return RecordDataset(
        read,
        lambda: fingerprint(whole.fingerprint(), f"{fraction} {held_out}"),
        _ONLY_RECORD.format(name=name) if held_out else whole.if_empty,
    )


def _hash(record: Any) -> int:
    return content_hash(_canonical(record))


def _text_of(value: Any) -> str:
    """Return a text of a value that JSON has not, which is the same for equal bytes and images."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {_text_of(value.tobytes())}"
    return str(value)


_canonical = partial(json.dumps, sort_keys=True, default=_text_of)
