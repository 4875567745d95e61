"""Documents of a file, or of a part of it, with the position of each and of each fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from typing import Any

from ditty_di.data import options
from ditty_di.data.reading.corpus import text_of
from ditty_di.data.reading.files import (
    COMPRESSED,
    AnyFile,
    as_record,
    is_of_content,
    kind_of,
    opened,
    parquet_file,
    parse_line,
    read_values,
    require_records,
    require_text,
)
from ditty_di.data.tokenization.long_documents import (
    LONG_STRING,
    Piece,
    pieces,
    without_long_strings,
)

#: Longest line that is read, in bytes: twice that is in memory for a moment.
MAX_LINE = 1 << 27
LINES = (".jsonl", ".ndjson")
RECORDS = (*LINES, ".json", ".csv", ".tsv", ".parquet")
#: Text of a .parquet file that is read at once, in bytes.
_BATCH = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n"


class DocumentError(ValueError):
    """A document that cannot be read.

    Args:
        file: Its file.
        where: Its position, such as `byte 14` or `row 3`; empty: the file as a whole.
        reason: Description of the fault.
        kind: The same in a few words, by which skipped documents are counted.
    """

    def __init__(
        self, file: AnyFile, where: str, reason: str, kind: str = "unreadable file"
    ) -> None:
        super().__init__(f"{file}: {where}: {reason}" if where else f"{file}: {reason}")
        self.reason, self.kind = reason, kind


Found = Iterator[Piece | DocumentError]


@dataclass(frozen=True)
class Reading:
    """How documents are found in files.

    Attributes:
        text_key: Key or column with the document, of records.
        documents: Unit of plain text that is a document: `file`, `line` or `paragraph` (between
            blank lines).
        max_document_mb: Size of a long document, in MiB of UTF-8. Encoding needs over a hundred
            times the memory of what is encoded at once.
        long_documents: `split`: a long document is yielded in pieces of at most that size, cut at
            lines where it has some; `error`: it is a `DocumentError`.
    """

    text_key: str = "text"
    documents: str = "file"
    max_document_mb: float = 1.0
    long_documents: str = "split"

    def __post_init__(self) -> None:
        options.one_of(("file", "line", "paragraph"), documents=self.documents)
        options.one_of(("split", "error"), long_documents=self.long_documents)
        most = MAX_LINE >> 20
        text = f"max_document_mb={self.max_document_mb} must be above 0, and at most {most}"
        options.require(64 <= self.limit <= MAX_LINE, text)

    @property
    def limit(self) -> int:
        """Size of a long document, in bytes."""
        return int(self.max_document_mb * 2**20)

    def has_ranges(self, file: AnyFile) -> bool:
        """Return whether documents can be read from any byte of a file on."""
        kind = kind_of(file)
        of_lines = kind in LINES if kind in RECORDS else self.documents != "file"
        return of_lines and file.suffix.lower() not in COMPRESSED

    def read(self, file: AnyFile, start: int = 0, stop: int | None = None) -> Found:
        """Yield the documents that begin in a range of a file, and errors in place of bad ones.

        Args:
            file: The file.
            start: First byte (or row group of .parquet) of the range.
            stop: First byte (or row group) after it; None: the end of the file.
        """
        if file.stat().st_size == 0:
            yield DocumentError(file, "byte 0", "the file is empty", "empty file")
            return
        if kind_of(file) == ".parquet":
            yield from self._rows(file, start, stop)
        elif kind_of(file) in LINES:
            yield from self._records(file, start, stop)
        elif kind_of(file) in RECORDS:
            yield from self._values(file)
        elif self.documents == "file":
            yield from self._whole(file)
        else:
            yield from self._texts(file, start, stop)

    # --- records ---------------------------------------------------------------------------------

    def _records(self, file: AnyFile, start: int, stop: int | None) -> Found:
        for at, line in _lines(file, start, stop, records=True):
            if isinstance(line, DocumentError):
                yield line
            elif len(line) > LONG_STRING:
                yield from self._long_record(line, file, f"byte {at}")
            elif line.strip(_BLANKS):
                value = parse_line(line)
                if isinstance(value, UnicodeDecodeError):
                    yield _not_utf8(file, at, value)
                else:
                    yield from self._record(value, file, f"byte {at + _offset(line, value)}")

    def _long_record(self, line: bytes, file: AnyFile, where: str) -> Found:
        """Yield the document of a line of many megabytes, of which little is decoded at once."""
        short, strings = without_long_strings(line)
        value = parse_line(short)
        text = value.get(self.text_key) if isinstance(value, dict) else None
        if not isinstance(text, str) or text not in strings:
            yield from self._record(value, file, where)
            return
        try:
            yield from self._stream(strings[text].read, file, where)
        except ValueError as error:
            yield DocumentError(file, where, str(error), "not JSON")

    def _values(self, file: AnyFile) -> Found:
        try:
            for where, value in read_values(file):
                yield from self._record(value, file, where)
        except ValueError as error:
            yield _of_file(file, error)

    def _record(self, value: Any, file: AnyFile, where: str) -> Found:
        """Yield the document of a value of a file, or of the error in its place."""
        try:
            text = text_of(as_record(value), self.text_key)
        except ValueError as error:
            kind = "no text"
            if isinstance(value, ValueError):
                kind = "not UTF-8" if isinstance(value, UnicodeDecodeError) else "not JSON"
            yield DocumentError(file, where, str(error), kind)
        else:
            yield from self._document(text, file, where)

    def _rows(self, file: AnyFile, start: int, stop: int | None) -> Found:
        import pyarrow

        row, strings = 0, (pyarrow.StringScalar, pyarrow.LargeStringScalar)
        try:
            # With a buffer size a column is read bit by bit, not as a whole.
            with parquet_file(file, buffer_size=_BATCH) as table:
                if self.text_key not in table.schema_arrow.names:
                    names = sorted(table.schema_arrow.names)
                    reason = f'no key "{self.text_key}" among {names}'
                    yield DocumentError(file, "", reason, "no text")
                    return
                groups = range(start, table.num_row_groups if stop is None else stop)
                found = [table.metadata.row_group(group) for group in range(groups.stop)]
                row = sum(group.num_rows for group in found[:start])
                largest = max((x.total_byte_size // max(x.num_rows, 1) for x in found), default=0)
                rows = min(max(_BATCH // max(largest, 1), 1), 64)
                batches = table.iter_batches(rows, row_groups=groups, columns=[self.text_key])
                for value in (value for batch in batches for value in batch.column(0)):
                    row += 1
                    try:
                        if isinstance(value, strings) and len(value.as_buffer() or b"") > _BATCH:
                            data = pyarrow.BufferReader(value.as_buffer())
                            yield from self._stream(data.read, file, f"row {row}")
                            continue
                        text = text_of({self.text_key: value.as_py()}, self.text_key)
                    except UnicodeDecodeError as error:
                        reason = f"not UTF-8 text: {error.reason} at byte {error.start}"
                        yield DocumentError(file, f"row {row}", reason, "not UTF-8")
                    except ValueError as error:
                        yield DocumentError(file, f"row {row}", str(error), "no text")
                    else:
                        yield from self._document(text, file, f"row {row}")
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and not is_of_content(error):
                raise
            after = f"after row {row}" if row else ""
            yield DocumentError(file, after, f"not a Parquet file that can be read: {error}")

    # --- plain text ------------------------------------------------------------------------------

    def _whole(self, file: AnyFile) -> Found:
        at = 0
        try:
            with opened(file) as stream:
                require_text(file, stream.peek(16)[:16])
                at = len(stream.read(len(_BOM))) if stream.peek(3).startswith(_BOM) else 0
                yield from self._stream(stream.read, file, "byte 0")
        except UnicodeDecodeError as error:
            yield _not_utf8(file, at, error)
        except ValueError as error:
            yield _of_file(file, error)

    def _texts(self, file: AnyFile, start: int, stop: int | None) -> Found:
        """Yield lines, or paragraphs: lines without a blank one between them."""
        paragraphs = self.documents == "paragraph"
        begin, size, kept = start, 0, BytesIO()
        for at, line in _lines(file, start, stop, paragraphs=paragraphs):
            if isinstance(line, DocumentError):
                size, kept = 0, BytesIO()
                yield line
                continue
            blank = not line.strip(_BLANKS)
            if not blank:
                begin, size = begin if size else at, size + len(line)
                if size <= MAX_LINE:
                    kept.write(line)
            if size and (blank or not paragraphs):
                yield from self._decoded(file, begin, size, kept)
                size, kept = 0, BytesIO()
        if size:
            yield from self._decoded(file, begin, size, kept)

    def _decoded(self, file: AnyFile, at: int, size: int, kept: BytesIO) -> Found:
        if size > MAX_LINE:
            reason = f"a paragraph of {size} bytes, and {MAX_LINE} are read at most"
            yield DocumentError(file, f"byte {at}", reason, "too long")
            return
        with kept.getbuffer() as data:
            while data[size - 1] in b"\r\n":
                size -= 1
        kept.truncate(size)
        kept.seek(0)
        try:
            yield from self._stream(kept.read, file, f"byte {at}")
        except UnicodeDecodeError as error:
            yield _not_utf8(file, at, error)

    # --- one document ----------------------------------------------------------------------------

    def _document(self, text: str, file: AnyFile, where: str) -> Found:
        data = text.encode()
        if len(data) > self.limit:
            yield from self._stream(BytesIO(data).read, file, where)
        elif text and not text.isspace():
            yield Piece(text, data)

    def _stream(self, read: Callable[[int], bytes], file: AnyFile, where: str) -> Found:
        """Yield a document of any size, given as a stream of its UTF-8."""
        if self.long_documents == "split":
            yield from pieces(read, self.limit)
        elif len(data := read(self.limit + 1)) > self.limit:
            yield DocumentError(
                file,
                where,
                f"a document above max_document_mb={self.max_document_mb:g}; raise it (encoding "
                "needs over a hundred times the memory), or set long_documents=split",
                "too long",
            )
        elif (text := data.decode()) and not text.isspace():
            yield Piece(text, data)


def _of_file(file: AnyFile, error: ValueError) -> DocumentError:
    reason = str(error).removeprefix(f"{file}").lstrip(": ").removeprefix("is ")
    return DocumentError(file, "", reason)


def _not_utf8(file: AnyFile, at: int, error: UnicodeDecodeError) -> DocumentError:
    reason = f"not UTF-8 text: {error.reason}"
    return DocumentError(file, f"byte {at + error.start}", reason, "not UTF-8")


def _offset(line: bytes, value: Any) -> int:
    """Return the byte of a line at which it is wrong; 0 if it is the value that is wrong."""
    if not isinstance(value, json.JSONDecodeError):
        return 0
    blanks = len(line) - len(line.lstrip(_BLANKS))
    return blanks + len(value.doc[: value.pos].encode())


def _lines(
    file: AnyFile, start: int, stop: int | None, *, records: bool = False, paragraphs: bool = False
) -> Iterator[tuple[int, bytes | DocumentError]]:
    """Yield (first byte, line) of the lines that begin in a range, and of what follows them.

    With `paragraphs` a paragraph belongs to the range in which it begins: lines of one that began
    before are left out, and lines after `stop` are yielded up to the first blank one.
    """
    at = start
    try:
        with opened(file) as stream:
            if start:
                at = _skip(stream, start, paragraphs)
            else:
                (require_records if records else require_text)(file, stream.peek(200)[:200])
            blank = True
            while stop is None or at < stop or (paragraphs and not blank):
                line = stream.readline(MAX_LINE)
                if not line:
                    return
                size = len(line)
                blank = not line.strip(_BLANKS)
                if size == MAX_LINE and not line.endswith(b"\n"):
                    while rest := stream.readline(_BATCH):
                        size += len(rest)
                        if rest.endswith(b"\n"):
                            break
                    reason = f"a line of {size} bytes, and {MAX_LINE} are read at most"
                    yield at, DocumentError(file, f"byte {at}", reason, "too long")
                else:
                    yield at, line.removeprefix(_BOM) if at == 0 else line
                at += size
    except ValueError as error:
        found = _of_file(file, error)
        yield at, DocumentError(file, f"byte {at}", found.reason)


def _skip(stream: BufferedReader, start: int, paragraphs: bool) -> int:
    """Go to the first line that begins at `start` or later; return where that is."""
    stream.seek(start - 1)
    if not paragraphs:
        while (part := stream.readline(_BATCH)) and not part.endswith(b"\n"):
            pass
        return stream.tell()
    # The line before decides whether one at `start` begins a paragraph: read it whole.
    begin = start - 1
    while begin > 0:
        size = min(begin, 1 << 16)
        stream.seek(begin - size)
        if (newline := stream.read(size).rfind(b"\n")) >= 0:
            begin += newline + 1 - size
            break
        begin -= size
    stream.seek(begin)
    while stream.readline(MAX_LINE).strip(_BLANKS):
        pass
    return stream.tell()
