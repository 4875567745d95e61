"""Values in one file: JSON lines, a JSON list, CSV or Parquet, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NoReturn

from ditty_di.data.options import require
from ditty_di.data.reading.remote import RemoteFile

#: A file of this machine, or a remote one.
AnyFile = Path | RemoteFile

#: Suffixes of compressed files. The first bytes decide whether a file is one, not its name.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def _zstd(stream: IO[bytes]) -> Any:
    import pyarrow  # Python has zstd from 3.14 on

    return pyarrow.CompressedInputStream(stream, "zstd")


_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}
#: What decompression raises for damaged data, beside `OSError` (`is_of_content`).
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
# First bytes of files without records, and what to do about them.
_REFUSED = {
    b"PK\x03\x04": "a zip archive (.zip, .xlsx): unpack it, and save a sheet as .csv",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run `git lfs pull`",
}
_NO_RECORDS = """\
{file} is not a file of records: it begins with {start!r}. Records are JSON objects, one a line or \
in a list (.jsonl, .json), or rows of .csv, .tsv or .parquet, each of them also as .gz; for plain \
text to train on use data=text data.corpus.path=..."""
_BOM = b"\xef\xbb\xbf"
_HEAD = 200  # bytes by which a file's format is checked
#: Rows of a table that are in memory at a time, which may have images.
ROWS_AT_ONCE = 100

#: Pairs (position in the file, value). A value that cannot be read is the `ValueError` that says
#: why. The position is "line 3", "line 3, item 2" of a JSON list, or "row 3" of a Parquet file,
#: counted from 1.
Values = Iterator[tuple[str, Any]]


def _plain(file: AnyFile) -> AnyFile:
    return file.with_suffix("") if file.suffix.lower() in COMPRESSED else file


def kind_of(file: AnyFile) -> str:
    """Return the suffix of the format, without that of a compression: `.jsonl`."""
    return _plain(file).suffix.lower()


def name_of(file: AnyFile) -> str:
    """Return a file's name without the suffixes of format and compression."""
    return _plain(file).stem


class Position(str):
    """Where a value stands, for messages: `file:3`."""

    #: Of the file, which relative paths in the value start from.
    folder: Path | None = None


def located(file: AnyFile, where: str) -> Position:
    """Return a value's file and position."""
    number = where.removeprefix("line ")
    position = Position(f"{file}, {where}" if number == where else f"{file}:{number}")
    position.folder = file.parent if isinstance(file, Path) else None
    return position


def folder_of(position: str) -> Path | None:
    """Return the folder of the file that a position is in; None where there is no file."""
    return position.folder if isinstance(position, Position) else None


def as_record(value: Any) -> dict[str, Any]:
    """Return a value of a file if it is a JSON object.

    Raises:
        ValueError: It is anything else, or could not be read.
    """
    if isinstance(value, UnicodeDecodeError):
        raise ValueError(f"not UTF-8 text: {value.reason} at byte {value.start}")
    if isinstance(value, json.JSONDecodeError):
        raise ValueError(f"not JSON: {value.msg} at column {value.colno}")
    if isinstance(value, ValueError):
        raise ValueError(f"not JSON: {value}")
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__} instead of an object")
    return value


def is_data_file(file: Path) -> bool:
    """Return whether a file in a folder has records, by its name; hidden files have none."""
    return kind_of(file) in READERS and not file.name.startswith(".") and file.is_file()


def read_values(file: AnyFile) -> Values:
    """Yield the values of a file with their positions.

    Files that end in .csv, .tsv or .parquet have rows, which are yielded as dicts; those of .csv
    and .tsv hold text. Any other file holds JSON values: one a line, or the items of one list, or
    objects that span several lines. NaN and Infinity are refused, as JSON has neither.

    Raises:
        ValueError: The file as a whole cannot be read, with the reason and the remedy.
    """
    kind = kind_of(file)
    try:
        if kind == ".parquet":
            yield from _parquet(file)
        else:
            with opened(file) as stream:
                require_records(file, stream.peek(_HEAD)[:_HEAD])
                yield from READERS.get(kind, _json)(stream)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason}") from error
    except csv.Error as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_lines(file: AnyFile) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text file that are not blank, with their positions.

    Raises:
        ValueError: The file is not UTF-8 text.
    """
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.removeprefix(_BOM if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number} is not UTF-8 text: {error.reason}") from error
            if text.strip():
                yield f"line {number}", text.rstrip("\r\n")


def first_bytes(file: AnyFile, count: int = _HEAD) -> bytes:
    """Return the first bytes of a file, decompressed."""
    with opened(file) as stream:
        return stream.read(count)


def has_several(file: AnyFile) -> bool:
    """Return whether a JSON file begins as a list of objects or as one object a line."""
    start = first_bytes(file, 1 << 16).removeprefix(_BOM).lstrip()
    first, newline, _ = start.partition(b"\n")
    is_list = re.match(rb"\[\s*\{", start) is not None
    return is_list or (bool(newline) and isinstance(parse_line(first), dict))


def looks_like_json(file: AnyFile) -> bool:
    """Return whether a file begins like JSON objects or a list of them."""
    start = first_bytes(file).removeprefix(_BOM).lstrip()
    return re.match(rb'\[\s*\{|\{\s*"', start) is not None


def require_records(file: AnyFile, start: bytes) -> None:
    """Check the first bytes of a file, decompressed.

    Raises:
        ValueError: They are not those of records.
    """
    require_text(file, start)
    text = start.removeprefix(_BOM).lstrip()
    if kind_of(file) not in READERS and text and not text.startswith((b"{", b"[")):
        raise ValueError(_NO_RECORDS.format(file=file, start=text[:20].decode(errors="replace")))


def require_text(file: AnyFile, start: bytes) -> None:
    """Raise `ValueError` if a file's first bytes are those of an archive or of UTF-16."""
    for magic, what in _REFUSED.items():
        require(not start.startswith(magic), f"{file} is {what}")


@contextmanager
def opened(file: AnyFile) -> Iterator[io.BufferedReader]:
    """Open a file for its bytes, decompressed if it is compressed.

    Raises:
        ValueError: It cannot be decompressed.
        ConnectionError, ...: Of a remote file, see `remote.explained`.
    """
    with file.open("rb") as raw:
        start = raw.peek(8)
        opener = next((o for magic, o in _OPENERS.items() if start.startswith(magic)), None)
        if opener is None:
            yield raw
            return
        try:
            with opener(raw) as stream:
                yield io.BufferedReader(stream)
        except (*_DAMAGED, OSError) as error:
            if isinstance(error, _DAMAGED) or is_of_content(error):
                raise ValueError(f"{file} cannot be decompressed: {error}") from error
            raise


def is_of_content(error: Exception) -> bool:
    """Return whether an error is how pyarrow and bz2 report damaged data, not of disk or store."""
    return type(error) is OSError and error.errno is None


# --- JSON ----------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value: write null, or leave the field out")


_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _json(stream: Iterable[bytes]) -> Values:
    """Yield one value a line, unless the first two lines show that values span several lines."""
    stream, head, filled = iter(stream), list[bytes](), list[bytes]()
    while len(filled) < 2 and (line := next(stream, None)):
        head.append(line)
        filled += [line] if _has_value(line) else []
    if not filled:
        return
    value = parse_line(filled[0])
    spans_lines = isinstance(value, ValueError) and filled[0].lstrip(_BOM + b" \t")[:1] in b"[{"
    if spans_lines or (isinstance(value, list) and len(filled) == 1):
        yield from _whole(b"".join([*head, *stream]).removeprefix(_BOM))
    else:
        yield from _lines(chain(head, stream))


def _has_value(line: bytes) -> bool:
    return bool(line.strip(b" \t\r\n" + _BOM))


def _lines(lines: Iterable[bytes]) -> Values:
    return ((f"line {n}", parse_line(line)) for n, line in enumerate(lines, 1) if _has_value(line))


def parse_line(line: bytes) -> Any:
    """Return the JSON value of a line, or the `ValueError` that says why it is none."""
    try:
        return _DECODER.decode(line.removeprefix(_BOM).decode("utf-8").strip(" \t\r\n"))
    except ValueError as error:
        return error


def _whole(data: bytes) -> Values:
    """Yield the items of a list, or objects that are not one a line."""
    try:
        yield from list(_items(data.decode("utf-8")))
    except ValueError as error:
        line = data.count(b"\n", 0, getattr(error, "start", 0)) + 1
        found = [(f"line {getattr(error, 'lineno', line)}", error)]
        if not data.lstrip().startswith(b"["):
            # One object a line, the first of which is damaged?
            separate = list(_lines(io.BytesIO(data)))
            if any(isinstance(value, dict) for _, value in separate):
                found = separate
        yield from found


def _items(text: str) -> Values:
    """Yield the items of a JSON list, or values that follow each other."""
    at = _skip_blanks(text, 0)
    is_list = text[at : at + 1] == "["
    at = _skip_blanks(text, at + is_list)
    line, counted, item = 1, 0, 0
    while at < len(text) and not (is_list and text[at] == "]"):
        value, end = _DECODER.raw_decode(text, at)
        line, counted, item = line + text.count("\n", counted, at), at, item + 1
        yield f"line {line}, item {item}" if is_list else f"line {line}", value
        at = _skip_blanks(text, end)
        if is_list and text[at : at + 1] == ",":
            at = _skip_blanks(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("a comma in front of the list's end", text, at)
        elif is_list and text[at : at + 1] not in ("]", ""):
            raise json.JSONDecodeError("no comma between two items of the list", text, at)
    if is_list and at >= len(text):
        raise json.JSONDecodeError("the list has no end: a ']' is missing", text, at)
    if is_list and (behind := _skip_blanks(text, at + 1)) < len(text):
        raise json.JSONDecodeError("there is text after the end of the list", text, behind)


def _skip_blanks(text: str, at: int) -> int:
    return _BLANKS.match(text, at).end()  # type: ignore[union-attr]  # it matches anywhere


# --- tables --------------------------------------------------------------------------------------


def _table(stream: IO[bytes], delimiters: str) -> Values:
    """Yield the rows below a header; the first delimiter that the header has separates fields."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 131,072 characters by default
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    first = text.readline()
    delimiter = next((d for d in delimiters if d in first), delimiters[0])
    header = next(csv.reader([first], delimiter=delimiter), [])
    names = [name for name in header if name]  # an index column has no name
    if len({*names}) < len(names):
        raise csv.Error(f"its header names a column twice: {header}")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    line = 2
    for row in rows if header else ():
        value: Any = {n: v for n, v in zip(header, row, strict=False) if n}
        if len(row) != len(header):
            value = ValueError(f"{len(row)} fields, where the header has {len(header)}")
        if row:
            yield f"line {line}", value
        line = rows.line_num + 2


def parquet_file(file: AnyFile, **options: Any) -> Any:
    """Return a Parquet file, open.

    Args:
        file: The file.
        **options: Arguments of `pyarrow.parquet.ParquetFile`.
    """
    from pyarrow import parquet

    return parquet.ParquetFile(file if isinstance(file, Path) else file.open(), **options)


def _parquet(file: AnyFile) -> Values:
    import datasets
    import pyarrow

    try:
        with parquet_file(file) as table:
            features = datasets.Features.from_arrow_schema(table.schema_arrow)
            for number, row in enumerate(table_rows(table.iter_batches(ROWS_AT_ONCE), features), 1):
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a Parquet file that can be read: {error}") from error


def table_rows(tables: Iterable[Any], features: Any) -> Iterator[dict[str, Any]]:
    """Yield rows with class labels, and lists of them, as names; None for hidden labels (-1).

    Objects lose their None values: Arrow gives every object of a column the keys of all others.

    Args:
        tables: Arrow tables, or batches of one.
        features: Their `datasets.Features`.
    """
    labels = {key: getattr(feature, "feature", feature) for key, feature in features.items()}
    names = {key: getattr(label, "int2str", None) for key, label in labels.items()}
    for table in tables:
        for row in table.to_pylist():
            yield {key: _clean(value, names[key]) for key, value in row.items()}


def _clean(value: Any, to_name: Callable[[Any], str] | None) -> Any:
    """Return a value without nulls in objects; labels of a column with names by their name."""
    if isinstance(value, list):
        return [_clean(item, to_name) for item in value]
    if isinstance(value, dict):
        return {k: _clean(v, to_name) for k, v in value.items() if v is not None}
    if to_name is None or value is None:
        return value
    return None if value < 0 else to_name(value)


#: Readers by suffix: of a stream, but Parquet of a file.
READERS: dict[str, Callable[[Any], Values]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": partial(_table, delimiters=",;\t"),
    ".tsv": partial(_table, delimiters="\t"),
    ".parquet": _parquet,
}
