"""Records by split: of files and folders (JSON, CSV, Parquet), and of Hugging Face datasets."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from ditty_di.data.cache import fingerprint
from ditty_di.data.files import (
    COMPRESSED,
    READERS,
    as_record,
    class_names,
    has_several,
    is_data_file,
    kind_of,
    located,
    name_of,
    read_values,
    require_records,
    with_names,
)
from ditty_di.protocols import early_checks

log = logging.getLogger(__name__)

#: What a split may be called, by its own name first.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
#: Held out of the training split when there is no validation split.
VALIDATION_FRACTION = 0.05

NO_SPLIT = """\
{source} has no {split} split: it has {found}. Add one ({where}){hint}."""
NO_VALIDATION = """\
, or let validation_fraction be above 0 to hold out a part of the training split, or train without \
validation: validator=none"""
ONLY_RECORD = """\
nothing can be held out of {name}: it has no two different records, and one is for training. Add \
records or a validation split, or train without validation: validator=none"""
NO_RECORDS = """\
no records in {name}: write one JSON object a line, such as {{"input": "...", "output": "..."}}"""
NO_SOURCE = """\
no examples at {path!r}: there is no such file or folder{hub}. Expected a folder with \
train/*.jsonl or train.jsonl, a file of records ({suffixes}), a list or pattern of them, a folder \
written by `save_to_disk`, or the name of a dataset on the Hugging Face Hub."""
NOT_IN_FOLDER = """\
no examples in {folder}: looked for train/*.jsonl, train.jsonl and *.jsonl (or any of {suffixes}), \
and found {found}"""
_SUFFIXES = ", ".join(READERS)


@dataclass(frozen=True)
class Records:
    """Records of one split, read anew by each iteration as pairs (where it stands, record).

    A line that is no JSON object comes as the exception that says so in place of the record.
    `fingerprint()` changes with the content. `if_empty` is the message when there are none.
    """

    read: Callable[[], Iterator[tuple[str, Any]]]
    fingerprint: Callable[[], str]
    if_empty: str = NO_RECORDS.format(name="the source of examples")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self.read()


def _check_options(split: str, validation_fraction: float | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if validation_fraction is not None and not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must be at least 0, below 1")


def _validate(
    *,
    path: Any = ...,
    split: str = "train",
    validation_fraction: float | None = None,
) -> None:
    """Raise `ValueError` for options out of range, and for a local source that has no records."""
    _check_options(split, validation_fraction)
    if not isinstance(path, str | list | os.PathLike | None):  # not known before it is built
        return
    if isinstance(path, str) and _is_dataset(Path(path).expanduser()):
        return  # reading it imports much
    try:
        source = _local(path)
        for file in source.files[:_FILES_LOOKED_AT] if source else ():
            require_records(file)
    except (OSError, ValueError) as error:
        if split != "train":  # said of the training split already
            return
        text = str(error)
        raise ValueError(text if text.startswith("path=") else f"path={path!r}: {text}") from error
    try:
        if source is not None:
            _lender(source, split, validation_fraction)
    except ValueError as error:
        about = f"path={path!r}"
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
) -> Records:
    """The records of one split (train, validation or test) of a source of examples.

    `path` is one of

    - a folder with `train/ val/ test/*.jsonl`, or `train.jsonl val.jsonl test.jsonl` (also
      `validation`), or else with .jsonl files that are all for training;
    - one .jsonl file, a list of them, or a pattern (`parts/*.jsonl`), all for training;
    - a dataset folder written by `datasets.Dataset.save_to_disk`;
    - a dataset on the Hugging Face Hub (`org/name`; configuration `name`, git `revision`).

    Where .jsonl is written, .json (a list of objects, or one a line), .csv, .tsv and .parquet do as
    well, all but the last also compressed (.gz, .bz2, .xz): see `files.read_values`. Of a file that
    is there both compressed and not, the latter is read.

    Class labels of a dataset come as their names, hidden ones (-1) as None.

    A source without a validation split lends it `validation_fraction` of its training split (0.05
    when None; 0: nothing): the records with the lowest hashes of their content, so that equal
    records are on one side and added ones move no others. It says nothing where there is one. A
    record that is the only one, up to equal ones, is for training, and none is held out.

    Raises `FileNotFoundError` for a source that does not exist, `ValueError` for a split that it
    lacks.
    """
    _check_options(split, validation_fraction)
    source = _local(path) or _hub(str(path), name, revision)
    found, fraction = _lender(source, split, validation_fraction)
    return _part(found, fraction, source.name, split == "validation") if fraction else found


def _lender(source: _Source, split: str, fraction: float | None) -> tuple[Records, float]:
    """Return the records of a split, and the fraction that is taken from or left in them.

    The fraction is 0 where they are the split itself.
    """
    fraction = VALIDATION_FRACTION if fraction is None else fraction
    lends = split != "test" and fraction > 0 and "validation" not in source.splits
    wanted = "train" if lends else split
    if wanted not in source.splits:
        raise ValueError(
            NO_SPLIT.format(
                source=source.name,
                split=split,
                found=" and ".join(source.splits) or "none",
                where=source.place_for(SPLITS[wanted][0]),
                hint=NO_VALIDATION if split == "validation" else "",
            )
        )
    return source.splits[wanted], fraction if lends else 0


def in_memory(examples: Sequence[Mapping[str, Any]]) -> Records:
    """Records that exist already: a list of dicts."""
    return Records(
        lambda: ((f"example {i}", example) for i, example in enumerate(examples)),
        lambda: fingerprint(*(_canonical(example) for example in examples)),
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
) -> Records:
    """Examples to debug with, as token ids of fixed lengths.

    All equal and of one token (`token_id`, else 0) when `static`, else each of one random token
    below `vocab_size` (with a `tokenizer`, its size): something that a model can learn at once.
    """
    import numpy as np

    vocab_size = vocab_size if tokenizer is None else len(tokenizer)
    ids = np.full(num_examples, token_id or 0)
    if not static:
        ids = np.random.default_rng(seed).integers(0, vocab_size, num_examples)
    return in_memory(
        [{"input": [i] * input_tokens, "output": [i] * output_tokens} for i in ids.tolist()]
    )


@dataclass(frozen=True)
class _Source:
    name: str
    splits: dict[str, Records]
    files: Sequence[Path] = ()
    is_folder: bool = False

    def place_for(self, split: str) -> str:
        """Return where the files of a split that is missing would be."""
        if self.is_folder:
            return f"{self.name}/{split}/*.jsonl or {self.name}/{split}.jsonl"
        return f"in a folder with train.jsonl and {split}.jsonl"


# Files whose first bytes `validate` reads.
_FILES_LOOKED_AT = 20


def _local(path: Any) -> _Source | None:
    """Return what a path on this machine holds; None for what may be a name on the Hub."""
    if path is None:
        raise ValueError("path=None: give a folder, a file of records, or a dataset's name")
    if not isinstance(path, str | os.PathLike):
        return _of_files([Path(p).expanduser() for p in path], f"the list of {len(path)} files")
    local = Path(path).expanduser()
    if local.is_file():
        return _of_files([local], str(local))
    if _is_dataset(local):
        import datasets

        return _dataset_source(str(local), datasets.load_from_disk(str(local)))
    if local.is_dir():
        return _folder(local)
    if found := sorted(Path(p) for p in glob(str(local), recursive=True)):
        return _of_files([p for p in found if not p.is_dir()], f"the files {local}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or kind_of(local) in READERS:
        raise FileNotFoundError(NO_SOURCE.format(path=str(path), hub="", suffixes=_SUFFIXES))
    return None


def _is_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _of_files(files: list[Path], name: str) -> _Source:
    return _Source(name, {"train": _records_of(files, name)}, files)


def _folder(folder: Path) -> _Source:
    inside = _data_files(folder.glob("*"))
    splits: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        files = [
            file
            for name in names
            for file in [
                *(file for file in inside if name_of(file) == name),
                *_data_files((folder / name).rglob("*")),
            ]
        ]
        if files:
            splits[split] = files
    if not splits and inside:
        # Beside records in .jsonl, a .json or .csv may tell something about them.
        inside = [file for file in inside if kind_of(file) != ".json" or has_several(file)]
        kind = next((kind for kind in READERS if kind in map(kind_of, inside)), "")
        splits["train"] = [file for file in inside if kind_of(file) == kind]
        if left_out := [file.name for file in inside if kind_of(file) != kind]:
            log.warning("%s: reads its %s files, not %s", folder, kind, ", ".join(left_out))
    if not any(splits.values()):
        others = sorted(path.name for path in folder.iterdir())
        found = f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" or "nothing"
        raise FileNotFoundError(
            NOT_IN_FOLDER.format(folder=folder, found=found, suffixes=_SUFFIXES)
        )
    return _Source(
        str(folder),
        {split: _records_of(files, f"{folder} ({split})") for split, files in splits.items()},
        [file for files in splits.values() for file in files],
        is_folder=True,
    )


def _data_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of records, sorted; of one that is there twice, not the compressed."""
    found = {path for path in paths if is_data_file(path)}
    twins = {file for file in found if file.suffix in COMPRESSED and file.with_suffix("") in found}
    return sorted(found - twins)


def _records_of(files: list[Path], name: str) -> Records:
    if not files:
        raise ValueError("path=[]: an empty list of files")
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: a list holds files only")
        if not file.is_file():
            raise FileNotFoundError(NO_SOURCE.format(path=str(file), hub="", suffixes=_SUFFIXES))

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            for where, value in read_values(file):
                yield located(file, where), _record(value)

    def content() -> str:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            if READERS.get(kind_of(file)) is not READERS[".json"]:  # the same bytes read otherwise
                digest.update(kind_of(file).encode())
        return digest.hexdigest()

    return Records(read, content, NO_RECORDS.format(name=name))


def _record(value: Any) -> Any:
    """Return a record, or a `ValueError` that says why it is not valid."""
    try:
        return as_record(value)
    except ValueError as error:
        return error


def _hub(path: str, name: str | None, revision: str | None) -> _Source:
    import datasets

    try:
        found = datasets.load_dataset(path, name, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f", and as a dataset of the Hugging Face Hub it cannot be read ({error})"
        message = NO_SOURCE.format(path=path, hub=reason, suffixes=_SUFFIXES)
        raise FileNotFoundError(message) from error
    return _dataset_source(path, found)


def _dataset_source(name: str, found: Any) -> _Source:
    """Of a `datasets.DatasetDict`, or a `datasets.Dataset` that is all for training."""
    by_name = dict(found) if isinstance(found, dict) else {"train": found}
    splits = {
        split: _dataset(f"{name} {own}", by_name[own])
        for split, names in SPLITS.items()
        for own in names
        if own in by_name
    }
    return _Source(name, splits)


def _dataset(name: str, dataset: Any) -> Records:
    names = class_names(dataset.features)

    def read() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(dataset):
            yield f"{name}, row {number}", with_names(row, names)

    return Records(
        read,
        lambda: fingerprint(dataset._fingerprint, repr(dataset.features)),
        f"no records: the dataset {name} has no rows",
    )


# --- a part of the training split, held out ----------------------------------------------------


def _part(whole: Records, fraction: float, name: str, held_out: bool) -> Records:
    limit = int(fraction * 2**64)

    def read() -> Iterator[tuple[str, Any]]:
        border = _border(whole, limit)
        for where, record in whole:
            if (_place(record) < border) == held_out:
                yield where, record

    return Records(
        read,
        lambda: fingerprint(whole.fingerprint(), f"{fraction} {held_out}"),
        ONLY_RECORD.format(name=name) if held_out else whole.if_empty,
    )


def _border(whole: Records, limit: int) -> int:
    """Return the place below which records are held out: `limit`, but that few records may all
    fall on one side of it, and then the nearest one changes it."""
    lowest, highest = 1 << 64, -1
    for _, record in whole:
        place = _place(record)
        lowest, highest = min(lowest, place), max(highest, place)
        if lowest < limit <= highest:
            return limit
    if lowest >= highest:
        return lowest  # one record, or none: for training
    return lowest + 1 if lowest >= limit else highest


def _place(record: Any) -> int:
    return int.from_bytes(hashlib.sha256(_canonical(record).encode()).digest()[:8], "big")


def _canonical(record: Any) -> str:
    return json.dumps(record, sort_keys=True, default=str)
