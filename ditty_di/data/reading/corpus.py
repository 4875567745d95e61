"""Corpora: documents as text, from files and folders."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditty_di.data import options
from ditty_di.data.cache import build_once, cache_folder
from ditty_di.data.reading.files import as_record, kind_of, located, opened, read_lines, read_values
from ditty_di.data.reading.splits import content_hash, threshold
from ditty_di.protocols import early_checks

# Formats of a single file; in a folder a .json file may be anything.
_KINDS = (".txt", ".jsonl", ".json")


@dataclass(frozen=True)
class Corpus:
    """Documents, split by document.

    Attributes:
        train: Documents to train on.
        validation: Documents held out for validation.
    """

    train: list[str]
    validation: list[str]


def train_documents(corpus: Corpus) -> list[str]:
    """Return the corpus' training documents, for a YAML node."""
    return corpus.train


def validation_documents(corpus: Corpus) -> list[str]:
    """Return the corpus' validation documents, for a YAML node."""
    return corpus.validation


def cached_corpus(
    cache_dir: str | os.PathLike[str] | None, name: str, read: Callable[[], Corpus]
) -> Corpus:
    """Return a corpus from the cache, made by `read` the first time.

    Raises:
        ValueError: The cached file is damaged.
    """

    def build(aside: Path) -> None:
        aside.write_text(json.dumps(vars(read())), encoding="utf-8")

    path = build_once(cache_folder(cache_dir) / "corpora" / f"{name}.json", build)
    try:
        return Corpus(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the cached corpus {path} is damaged ({error}): delete it") from error


def _validate(
    *,
    path: str | os.PathLike[str] | None = None,
    validation_path: str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.05,
) -> None:
    options.fraction(validation_fraction=validation_fraction)
    for name, given in (("path", path), ("validation_path", validation_path)):
        if isinstance(given, str | os.PathLike):
            try:
                _files(Path(given).expanduser())
            except (OSError, ValueError) as error:
                raise ValueError(f"{name}={str(given)!r}: {error}") from error


@early_checks(validate=_validate)
def text_files(
    path: str | os.PathLike[str],
    *,
    validation_path: str | os.PathLike[str] | None = None,
    text_key: str = "text",
    split_lines: bool = False,
    deduplicate: bool = True,
    validation_fraction: float = 0.05,
) -> Corpus:
    """Read a corpus from a file, or from every .txt and .jsonl file in a folder (recursively).

    A `.txt` file is one document. Every line of a `.jsonl` file is an object; a single `.json` file
    may be a list of them. Each may be compressed (.gz, .bz2, .xz, .zst).

    Args:
        path: File or folder of the training documents.
        validation_path: File or folder of the validation documents; those that are also training
            documents are left out.
        text_key: Key of an object's document.
        split_lines: Every non-empty line of a `.txt` file is a document.
        deduplicate: Keep only the first of the documents that are equal up to white space.
        validation_fraction: Without `validation_path`, the fraction of the documents that is held
            out, by the documents' hashes (`splits.threshold`). A corpus of one document is cut in
            two at a line or word.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: A bad line (with file and line number), text that is not UTF-8, an unknown kind
            of file, or no documents.
    """
    options.fraction(validation_fraction=validation_fraction)

    def read(source: Path) -> list[tuple[str, str]]:
        entries = [("", text) for text in _read(source, text_key, split_lines)]
        documents = distinct(entries) if deduplicate else [(text, text) for _, text in entries]
        if not documents:
            found = f"{len(_files(source))} .txt and .jsonl files under this folder"
            if source.is_file():
                found = f"this one file ({source.stat().st_size} bytes)"
            raise ValueError(f"no documents in {source}: looked for non-empty text in {found}.")
        return documents

    documents = read(Path(path).expanduser())
    if validation_path is None:
        return split_documents(documents, validation_fraction)
    seen = {_normalized(body) for _, body in documents}
    held_out = read(Path(validation_path).expanduser())
    validation = [text for text, body in held_out if _normalized(body) not in seen]
    options.require(
        bool(validation),
        f"every document of {validation_path} is also in {path}: nothing is left to validate on",
    )
    return Corpus([text for text, _ in documents], validation)


# --- documents as pairs (text, body): the body decides about duplicates and the split ------------


def _normalized(text: str) -> str:
    return " ".join(text.split())


def distinct(entries: Iterable[tuple[str, str]], min_chars: int = 1) -> list[tuple[str, str]]:
    """Return the documents of pairs (header, body), one of each body.

    Args:
        entries: Pairs (header, body); the header may be empty.
        min_chars: Shorter bodies are left out, in characters.

    Returns:
        Pairs (text, body), in which the text begins with the header.
    """
    kept: dict[str, tuple[str, str]] = {}
    for header, body in entries:
        key = _normalized(body)
        if len(key) >= min_chars:
            kept.setdefault(key, (f"{header}\n\n{body}" if header else body, body))
    return list(kept.values())


def split_documents(documents: list[tuple[str, str]], fraction: float) -> Corpus:
    """Split documents by the hashes of their bodies; cut a single one in two.

    Args:
        documents: Pairs (text, body).
        fraction: Fraction of the documents to hold out.
    """
    if len(documents) == 1 and fraction:
        return _cut(documents[0][0], fraction)
    hashes = [content_hash(_normalized(body)) for _, body in documents]
    limit = threshold(hashes, fraction) if fraction else 0
    sides: tuple[list[str], list[str]] = ([], [])
    for (text, _), value in zip(documents, hashes, strict=True):
        sides[value < limit].append(text)
    return Corpus(*sides)


def _cut(text: str, fraction: float) -> Corpus:
    text = text.strip()
    if len(text) < 2:
        return Corpus([text], [])
    at = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    borders = (text.rfind(separator, 0, at + 1) for separator in ("\n", " "))
    at = next((border for border in borders if border > at // 2), at)
    return Corpus([text[:at]], [text[at:]])


# --- files ---------------------------------------------------------------------------------------


def _files(source: Path) -> list[Path]:
    expected = "expected a .txt or .jsonl file, or a folder of them"
    if not source.exists():
        raise FileNotFoundError(f"no corpus at {source.absolute()}: {expected}")
    if source.is_file():
        options.require(kind_of(source) in _KINDS, f"{source}: {expected}")
        return [source]
    found = (path for path in source.rglob("*") if kind_of(path) in {".txt", ".jsonl"})
    return sorted(path for path in found if path.is_file())


def _read(source: Path, text_key: str, split_lines: bool) -> Iterator[str]:
    for path in _files(source):
        if kind_of(path) != ".txt":
            texts = _objects(path, text_key)
        else:
            texts = (line for _, line in read_lines(path)) if split_lines else _whole(path)
        yield from (text for text in texts if text.strip())


def _whole(path: Path) -> Iterator[str]:
    try:
        with opened(path) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig").read().strip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _objects(path: Path, text_key: str) -> Iterator[str]:
    for where, value in read_values(path):
        try:
            yield text_of(as_record(value), text_key)
        except ValueError as error:
            raise ValueError(
                f"{located(path, where)}: {error}. Every line is one JSON object whose key "
                f'"{text_key}" holds the document; `text_key` names another key.'
            ) from error


def text_of(record: dict[str, Any], key: str) -> str:
    """Return the document of a record.

    Raises:
        ValueError: The record lacks the key, or its value is not text.
    """
    if key not in record:
        raise ValueError(f'no key "{key}" among {sorted(record)}')
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f'"{key}" holds a {type(text).__name__} instead of text')
    return options.check_text(text, f'"{key}"')
