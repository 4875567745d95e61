"""Records of any source as a Hugging Face dataset, changed by its own methods."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from ditty_di.config import View
from ditty_di.data.cache import cache_folder, counted, fingerprint
from ditty_di.data.reading.files import as_record
from ditty_di.data.reading.sources import RecordDataset
from ditty_di.data.tokenization.documents import DocumentError, Reading
from ditty_di.messages import did_you_mean
from ditty_di.protocols import early_checks

log = logging.getLogger(__name__)

#: A callable of a dataset that returns a dataset; or the name of a method of `datasets.Dataset`,
#: positional arguments, and a mapping of keyword arguments at the end.
Operation = Callable[[Any], Any] | Sequence[Any]


def _validate(*, operations: Any = ()) -> None:
    for number, operation in enumerate(_in_order(operations)):
        named = isinstance(operation, list | tuple) and operation
        if not (named or callable(operation) or isinstance(operation, View)):
            raise ValueError(
                f"operations={operation!r} (number {number}): write a node with _target_ (and "
                f"_partial_: true), such as datasets.Dataset.map, or [map, {{...}}]"
            )


def _in_order(operations: Any) -> list[Any]:
    found = operations.values() if isinstance(operations, Mapping) else operations
    return [operation for operation in found if operation is not None]


@early_checks(validate=_validate)
def prepare(source: Any, operations: Iterable[Operation] | Mapping[str, Operation] = ()) -> Any:
    """Return a dataset of the records of a source, changed by operations in their order.

    The rows of files and of the results of `map` and `filter` are cached on disk by their content,
    the arguments and the code of the module that a function is from; of several ranks on one file
    system, the first does the work. What a function's module imports is not looked at.

    Args:
        source: a `datasets.Dataset`, a `ditty_di.data.RecordDataset`, or a source of documents
            (`ditty_di.data.tokenization.TextFiles`, `HubFiles`), whose rows have the column `text`.
        operations: a list, or a mapping whose values are taken in order; None is left out. Such as
            `partial(datasets.Dataset.map, function=tokenize, batched=True)`, or
            `("map", tokenize, {"batched": True})`.

    Raises:
        ValueError: no method of this name; no row left; a record that cannot be read.
        TypeError: an operation that does not return a dataset.
    """
    _validate(operations=operations)
    with ExitStack() as stack:
        if not hasattr(source, "column_names"):
            content = source if isinstance(source, RecordDataset) else _documents(source)
            folder = cache_folder() / "datasets" / content.fingerprint()[:32]
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "lock"))
            source = _stored(content, folder)
        for operation in _in_order(operations):
            source = _changed(source, operation)
    return source


def _documents(source: Any) -> RecordDataset:
    """Return the documents of text files as records with the key `text`."""
    reading = Reading(source.text_key, source.documents)
    files = source.files()

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            parts: list[str] = []
            for piece in reading.read(file.path):
                if isinstance(piece, DocumentError):
                    raise piece
                parts.append(piece.text)
                if piece.ends:
                    yield file.name, {"text": "".join(parts)}
                    parts = []

    def content() -> str:
        stats = [(file.name, file.path.stat()) for file in files]
        known = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        return fingerprint(source.text_key, source.documents, *known)

    return RecordDataset(read, content)


def _stored(records: RecordDataset, folder: Path) -> Any:
    """Return the records as a dataset of Arrow files in a folder; read them where there is none."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    options = {"cache_dir": str(folder), "fingerprint": folder.name}
    try:
        return Dataset.from_generator(_rows, gen_kwargs={"records": records}, **options)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _rows(records: RecordDataset) -> Iterator[dict[str, Any]]:
    empty = True
    for where, record in counted(records, "reading records", "records"):
        empty = False
        try:
            yield as_record(record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if empty:
        raise ValueError(records.if_empty)


def _changed(dataset: Any, operation: Operation) -> Any:
    """Return what an operation makes of a dataset."""
    method, arguments, keywords = _call(dataset, operation)
    name = getattr(method, "__name__", type(method).__name__)
    taken = inspect.signature(method).parameters
    if {"function", "new_fingerprint"} <= taken.keys() and "new_fingerprint" not in keywords:
        keywords |= _cache_key(dataset, name, arguments, keywords)
    changed = method(dataset, *arguments, **keywords)
    if not (hasattr(changed, "column_names") and hasattr(changed, "__len__")):
        raise TypeError(f"operations: {name!r} returned {type(changed).__name__}, not a dataset")
    log.info("%s: %d rows, now %d", name, len(dataset), len(changed))
    if not len(changed):
        raise ValueError(f"operations: no row of {len(dataset)} is left after {name!r}")
    return changed


def _call(
    dataset: Any, operation: Operation
) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """Return a function of a dataset, and its further arguments."""
    if isinstance(operation, partial):
        return operation.func, [*operation.args], {**operation.keywords}
    if callable(operation):
        return operation, [], {}
    name, *arguments = operation
    *positional, keywords = arguments or ({},)
    if not isinstance(keywords, Mapping):
        raise ValueError(
            f"operations: {name!r} ends with {type(keywords).__name__}; write its keyword "
            f"arguments as a mapping at the end, {{}} for none"
        )
    kind = type(dataset)
    methods = [n for n in dir(kind) if n[0] != "_" and inspect.isfunction(getattr(kind, n))]
    if name not in methods:
        raise ValueError(
            f"operations: {kind.__name__} has no method {name!r}{did_you_mean(name, methods)}; "
            f"write a method of datasets.{kind.__name__} that returns a dataset"
        )
    return getattr(kind, name), [a for a in positional if a is not None], {**keywords}


def _cache_key(dataset: Any, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
    """Return the fingerprint of a result that also follows the code of what is called.

    The library's own knows an imported function by its name: a result that was cached before the
    function was changed would be taken (datasets 4.7).
    """
    from datasets.fingerprint import Hasher

    try:
        given = Hasher.hash((arguments, keywords))
    except Exception:  # an argument that cannot be pickled: the library warns, and does not cache
        return {}
    code = [path.read_bytes() for path in sorted(_sources([*arguments, *keywords.values()]))]
    return {"new_fingerprint": fingerprint(dataset._fingerprint, name, given, *code)[:32]}


def _sources(values: Iterable[Any]) -> set[Path]:
    """Return the files of the modules that callables are from."""
    found: set[Path] = set()
    for value in values:
        if isinstance(value, partial):
            found |= _sources([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, Mapping):
            found |= _sources(value.values())
        elif callable(value):
            defined = value if hasattr(value, "__qualname__") else type(value)
            file = getattr(inspect.getmodule(defined), "__file__", None)
            found |= {Path(file)} if file else set()
    return found
