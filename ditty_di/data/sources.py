"""Where examples come from: folders and files of jsonl, and Hugging Face datasets, by split."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditty_di.data.cache import fingerprint
from ditty_di.data.conversations import without_nulls

#: What a split may be called, by its own name first.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
#: Held out of the training split when there is no validation split.
VALIDATION_FRACTION = 0.05

NO_SPLIT = """\
{source} has no {split} split: it has {found}. Add one ({source}/{name}/*.jsonl or \
{source}/{name}.jsonl in a folder of files){hint}."""
NO_SOURCE = """\
no examples at {path!r}: there is no such file or folder{hub}. Expected a folder with \
train/*.jsonl or train.jsonl, a .jsonl file, a list of them, a folder written by `save_to_disk`, \
or the name of a dataset on the Hugging Face Hub."""


@dataclass(frozen=True)
class Records:
    """Records of one split, read anew by each iteration as pairs (where it stands, record).

    A line that is no JSON object comes as the exception that says so in place of the record.
    `fingerprint()` changes with the content.
    """

    read: Callable[[], Iterator[tuple[str, Any]]]
    fingerprint: Callable[[], str]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self.read()


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
    - one .jsonl file, or a list of them, all for training;
    - a dataset folder written by `datasets.Dataset.save_to_disk`;
    - a dataset on the Hugging Face Hub (`org/name`; configuration `name`, git `revision`).

    Class labels of a dataset come as their names, hidden ones (-1) as None.

    A source without a validation split lends it `validation_fraction` of its training split (0.05
    when None; 0: nothing): the records with the lowest hashes of their content, so that equal
    records are on one side and added ones move no others. It says nothing where there is one.

    Raises `FileNotFoundError` for a source that does not exist, `ValueError` for a split that it
    lacks.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if validation_fraction is not None and not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must be at least 0, below 1")
    source = _source(path, name, revision)
    fraction = VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    lends = split != "test" and fraction > 0 and "validation" not in source.splits
    wanted = "train" if lends else split
    if wanted not in source.splits:
        raise ValueError(
            NO_SPLIT.format(
                source=source.name,
                split=split,
                found=" and ".join(source.splits) or "none",
                name=SPLITS[wanted][0],
                hint=", or let validation_fraction be above 0" if split == "validation" else "",
            )
        )
    found = source.splits[wanted]
    return _part(found, fraction, held_out=split == "validation") if lends else found


def in_memory(examples: Sequence[Mapping[str, Any]]) -> Records:
    """Records that exist already: a list of dicts."""
    return Records(
        lambda: ((f"example {i}", example) for i, example in enumerate(examples)),
        lambda: fingerprint(*(_canonical(example) for example in examples)),
    )


def synthetic(
    num_examples: int,
    *,
    token_id: int | None = None,
    vocab_size: int = 256,
    input_tokens: int = 64,
    output_tokens: int = 64,
    static: bool = True,
    seed: int = 0,
) -> Records:
    """Examples to debug with, as token ids of fixed lengths.

    All equal and of one token (`token_id`, else 0) when `static`, else each of one random token
    below `vocab_size`: something that a model can learn at once.
    """
    import numpy as np

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


def _source(path: Any, name: str | None, revision: str | None) -> _Source:
    if not isinstance(path, str | os.PathLike):
        return _Source(f"the list of {len(path)} files", {"train": _jsonl([Path(p) for p in path])})
    local = Path(path).expanduser()
    if local.is_file():
        return _Source(str(local), {"train": _jsonl([local])})
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        import datasets

        return _dataset_source(str(local), datasets.load_from_disk(str(local)))
    if local.is_dir():
        return _folder(local)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or local.suffix == ".jsonl":
        raise FileNotFoundError(NO_SOURCE.format(path=str(path), hub=""))
    return _hub(str(path), name, revision)


def _folder(folder: Path) -> _Source:
    splits: dict[str, Records] = {}
    for split, names in SPLITS.items():
        files = [
            file
            for name in names
            for file in [folder / f"{name}.jsonl", *sorted((folder / name).rglob("*.jsonl"))]
            if file.is_file()
        ]
        if files:
            splits[split] = _jsonl(files)
    if not splits and (files := sorted(folder.glob("*.jsonl"))):
        splits["train"] = _jsonl(files)
    if not splits:
        raise FileNotFoundError(
            f"no examples in {folder}: looked for train/*.jsonl, train.jsonl and *.jsonl"
        )
    return _Source(str(folder), splits)


def _jsonl(files: list[Path]) -> Records:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(NO_SOURCE.format(path=str(file), hub=""))

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"{file}:{number}", _parsed(line.removeprefix(b"\xef\xbb\xbf"))

    def content() -> str:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    return Records(read, content)


def _parsed(line: bytes) -> Any:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}")
    except ValueError as error:
        return ValueError(f"not JSON: {error}")
    if not isinstance(record, dict):
        return ValueError(f"a JSON {type(record).__name__} instead of an object")
    return record


def _hub(path: str, name: str | None, revision: str | None) -> _Source:
    import datasets

    try:
        found = datasets.load_dataset(path, name, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f", and as a dataset of the Hugging Face Hub it cannot be read ({error})"
        raise FileNotFoundError(NO_SOURCE.format(path=path, hub=reason)) from error
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
    # A class label has the names of its numbers; other features are what they hold.
    to_name = {
        key: feature.int2str
        for key, feature in dataset.features.items()
        if hasattr(feature, "int2str")
    }

    def read() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(dataset):
            for key, convert in to_name.items():
                hidden = row[key] is None or row[key] < 0
                row[key] = None if hidden else convert(row[key])
            # Arrow gives every object within a column the keys of all others, as None.
            yield (
                f"{name}, row {number}",
                {key: without_nulls(value) for key, value in row.items()},
            )

    return Records(read, lambda: fingerprint(dataset._fingerprint, repr(dataset.features)))


# --- a part of the training split, held out ----------------------------------------------------


def _part(whole: Records, fraction: float, *, held_out: bool) -> Records:
    limit = int(fraction * 2**64)

    def read() -> Iterator[tuple[str, Any]]:
        # Few records can all fall on one side: the one nearest to the limit changes it.
        places = sorted({_place(record) for _, record in whole})
        border = limit
        if places and places[0] >= limit:
            border = places[0] + 1
        elif len(places) > 1 and places[-1] < limit:
            border = places[-1]
        for where, record in whole:
            if (_place(record) < border) == held_out:
                yield where, record

    return Records(read, lambda: fingerprint(whole.fingerprint(), f"{fraction} {held_out}"))


def _place(record: Any) -> int:
    return int.from_bytes(hashlib.sha256(_canonical(record).encode()).digest()[:8], "big")


def _canonical(record: Any) -> str:
    return json.dumps(record, sort_keys=True, default=str)
