"""Corpora: the running Python's own documentation, and a user's text files."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ditty_di.data.cache import build_once, cache_folder, counted
from ditty_di.data.files import as_record, kind_of, located, opened, read_values
from ditty_di.protocols import early_checks

# Raise it when python_docs() would give other documents from the same Python.
_PYTHON_DOCS_FORMAT = 1
# Shorter texts ("Return self.", "See base class.") teach nothing and repeat in variants.
_PYTHON_DOCS_MIN_CHARS = 40
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Documents, split by document: none is in both lists."""

    train: list[str]
    validation: list[str]


def train_documents(corpus: Corpus) -> list[str]:
    """The corpus' `train` list, for a YAML node."""
    return corpus.train


def validation_documents(corpus: Corpus) -> list[str]:
    """The corpus' `validation` list, for a YAML node."""
    return corpus.validation


def python_docs(
    cache_dir: str | os.PathLike[str] | None = None, validation_fraction: float = 0.05
) -> Corpus:
    """The running Python's language reference topics and the docstrings of its standard library.

    About 2 MB of English about Python, without network. Sources are parsed, never imported. The
    result depends on the Python version alone and is cached by it. Each docstring follows a line
    that names it (`def json.dumps(obj, *, skipkeys=False, ...)`).

    Raises `ValueError` when this Python carries no source files.
    """
    _check_fraction(validation_fraction)
    version = f"{sys.implementation.name}-{platform.python_version()}"
    name = f"python-docs-{version}-{validation_fraction:g}-v{_PYTHON_DOCS_FORMAT}.json"

    def build(path: Path) -> None:
        library = Path(sysconfig.get_path("stdlib"))
        found = chain(topics(library), _docstrings(library))
        entries = list(counted(found, "reading the documentation of this Python", "texts"))
        corpus = _split(_distinct(entries, _PYTHON_DOCS_MIN_CHARS), validation_fraction)
        if not corpus.train:
            raise ValueError(
                f"the standard library in {library} has no Python sources with documentation. "
                "Use a corpus of your own: data=text data.corpus.path=..."
            )
        path.write_text(json.dumps(vars(corpus)), encoding="utf-8")

    path = build_once(cache_folder(cache_dir) / "corpora" / name, build)
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
    """Raise `ValueError` for files that do not exist or are of another kind."""
    _check_fraction(validation_fraction)
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
    """A corpus from a `.txt` or `.jsonl` file, or from every such file in a folder (recursively).

    A `.txt` file is one document, or with `split_lines` every non-empty line is one. Every line of
    a `.jsonl` file is an object with the document under `text_key`; a single `.json` file may be a
    list of them. Each may be compressed (.gz, .bz2, .xz). With `deduplicate`, of texts
    equal up to white space the first stays.

    Validation documents come from `validation_path` (what it shares with the training documents is
    left out), or are the `validation_fraction` of the documents with the lowest hashes: adding
    documents moves none of the others. A corpus of one document is cut in two at a line or word.

    Raises `FileNotFoundError`, and `ValueError` for a bad line (with file and line number), text
    that is not UTF-8, an unknown kind of file, or a corpus without documents.
    """
    _check_fraction(validation_fraction)

    def read(source: Path) -> list[tuple[str, str]]:
        entries = [("", text) for text in _read(source, text_key, split_lines)]
        documents = _distinct(entries) if deduplicate else [(text, text) for _, text in entries]
        if not documents:
            raise ValueError(
                f"no documents in {source}: looked for non-empty text in {_files_in_words(source)}."
            )
        return documents

    documents = read(Path(path).expanduser())
    if validation_path is None:
        return _split(documents, validation_fraction)
    seen = {_normalised(body) for _, body in documents}
    held_out = read(Path(validation_path).expanduser())
    validation = [text for text, body in held_out if _normalised(body) not in seen]
    if not validation:
        raise ValueError(
            f"every document of {validation_path} is also in {path}: nothing is left to validate on"
        )
    return Corpus([text for text, _ in documents], validation)


def held_out_module(name: str) -> bool:
    """Whether a module of the standard library, such as `json.decoder`, is kept out of training.

    One in ten, by a hash of the name, for corpora and data sets that are made of its source.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < 2**64 // 10


# --- documents as (text, body) pairs: the body decides about duplicates and the split ----------


def _normalised(text: str) -> str:
    return " ".join(text.split())


def _distinct(entries: Iterable[tuple[str, str]], min_chars: int = 1) -> list[tuple[str, str]]:
    """(header, body) pairs to (text, body) pairs, the first of each body, none too short."""
    kept: dict[str, tuple[str, str]] = {}
    for header, body in entries:
        key = _normalised(body)
        if len(key) >= min_chars and key not in kept:
            kept[key] = (f"{header}\n\n{body}" if header else body, body)
    return list(kept.values())


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction={fraction} must be at least 0 and below 1")


def _split(documents: list[tuple[str, str]], fraction: float) -> Corpus:
    """By a hash of the text, so that a document's side does not depend on the other documents."""
    if not fraction or not documents:
        return Corpus([text for text, _ in documents], [])
    if len(documents) == 1:
        return _cut(documents[0][0], fraction)
    hashes = [hashlib.sha256(_normalised(body).encode()).digest()[:8] for _, body in documents]
    limit = int(fraction * 2**64)
    held_out = {i for i, value in enumerate(hashes) if int.from_bytes(value, "big") < limit}
    # Few documents can all fall on one side: the one nearest to the limit changes it.
    if not held_out:
        held_out = {min(range(len(documents)), key=lambda i: (hashes[i], i))}
    elif len(held_out) == len(documents):
        held_out.remove(max(held_out, key=lambda i: (hashes[i], i)))
    return Corpus(
        [text for i, (text, _) in enumerate(documents) if i not in held_out],
        [text for i, (text, _) in enumerate(documents) if i in held_out],
    )


def _cut(text: str, fraction: float) -> Corpus:
    text = text.strip()
    if len(text) < 2:
        return Corpus([text], [])
    at = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    for separator in ("\n", " "):
        boundary = text.rfind(separator, 0, at + 1)
        if boundary > at // 2:
            at = boundary
            break
    return Corpus([text[:at]], [text[at:]])


# --- the standard library ----------------------------------------------------------------------


def topics(library: Path) -> Iterator[tuple[str, str]]:
    """The language reference behind `help("topic")`: one literal dict in one source file."""
    path = library / "pydoc_data" / "topics.py"
    tree = parse(path) if path.is_file() else None
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield "", text.strip()


def modules(library: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each module of the standard library, in one order everywhere."""
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        parts = path.relative_to(library).with_suffix("").parts
        # Not site-packages, which lies in the same folder, and not the tests of the library.
        if parts[0] in sys.stdlib_module_names and not _TEST_FOLDERS.intersection(parts):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    for module, path in modules(library):
        tree = parse(path)
        if tree is not None:
            yield from _docstrings_in(tree, module)


def _docstrings_in(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        body = (ast.get_docstring(node) or "").strip()
        if encodable(body):
            yield _header(node, name), body
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None)
        is_scope = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _docstrings_in(child, f"{name}.{inner}" if is_scope else name)


def _header(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {name}({ast.unparse(node.args)})"
    return f"module {name}"


def parse(path: Path) -> ast.Module | None:
    """The module's tree; None for the few files that are broken on purpose (templates, tests)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def encodable(text: str) -> bool:
    """False for lone surrogates, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- a user's files ----------------------------------------------------------------------------


def _read(source: Path, text_key: str, split_lines: bool) -> Iterator[str]:
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": _lines if split_lines else _whole,
        ".jsonl": lambda path: _objects(path, text_key),
    }
    readers[".json"] = readers[".jsonl"]
    for path in _files(source):
        try:
            yield from readers[kind_of(path)](path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error


#: What a single file may be; in a folder a .json file may be anything.
_KINDS = (".txt", ".jsonl", ".json")


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise FileNotFoundError(
            f"no corpus at {source.absolute()}: expected a .txt or .jsonl file, or a folder of them"
        )
    if source.is_file():
        if kind_of(source) not in _KINDS:
            raise ValueError(f"{source}: expected a .txt or .jsonl file, or a folder of them")
        return [source]
    found = (path for path in source.rglob("*") if kind_of(path) in {".txt", ".jsonl"})
    return sorted(path for path in found if path.is_file())


def _files_in_words(source: Path) -> str:
    if source.is_file():
        return f"this one file ({source.stat().st_size} bytes)"
    return f"{len(_files(source))} .txt and .jsonl files under this folder"


def _whole(path: Path) -> Iterator[str]:
    with opened(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig").read().strip("\n")
    if text.strip():
        yield text


def _lines(path: Path) -> Iterator[str]:
    with opened(path) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig"):
            if line.strip():
                yield line.strip("\n")


def _objects(path: Path, text_key: str) -> Iterator[str]:
    for where, value in read_values(path):
        try:
            text = _text_of(as_record(value), text_key)
        except ValueError as error:
            raise ValueError(
                f"{located(path, where)}: {error}. Every line is one JSON object whose key "
                f'"{text_key}" holds the document; `text_key` names another key.'
            ) from error
        if text.strip():
            yield text


def _text_of(record: dict[str, Any], text_key: str) -> str:
    if text_key not in record:
        raise ValueError(f'no key "{text_key}" among {sorted(record)}')
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f'"{text_key}" holds a {type(text).__name__} instead of text')
    if not encodable(text):
        raise ValueError(f'"{text_key}" holds half of a surrogate pair, which is not text')
    return text
