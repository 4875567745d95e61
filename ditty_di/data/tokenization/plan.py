"""Parts of a tokenization: a pure function of the input's files, so the same for every rank."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ditty_di.data.cache import fingerprint
from ditty_di.data.reading.files import COMPRESSED, AnyFile, kind_of, parquet_file
from ditty_di.data.tokenization.documents import Reading
from ditty_di.data.tokenization.sources import File

#: Raise it when the same input and settings would give other bytes.
VERSION = 1
#: Text in a compressed file, relative to the file's size; only for the estimate of space.
_EXPANSION = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of a file.

    Attributes:
        path: The file.
        start: Its first byte, or row group of .parquet.
        stop: The first one after it; None: the end of the file.
        size: Bytes of text in it, as far as known.
    """

    path: AnyFile
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes that one process tokenizes at a time, into one shard a split.

    Attributes:
        number: Its number; parts in this order are the input in its order.
        segments: Its documents.
    """

    number: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes of text, as far as known."""
        return sum(segment.size for segment in self.segments)


def part_size(files: Sequence[File]) -> int:
    """Return the text of a part, in bytes: a 64th of the files, from 4 to 256 MiB."""
    return min(max(sum(_text_size(file.path) for file in files) // 64, 4 << 20), 256 << 20)


def plan(files: Sequence[File], reading: Reading, part_bytes: int) -> tuple[Part, ...]:
    """Return the parts of files.

    Files of lines are cut at any line, .parquet between row groups; other and compressed files are
    never cut. Small files share a part.

    Args:
        files: The files, in their order.
        reading: How documents are found in them.
        part_bytes: Text of a part, in bytes.
    """
    parts: list[list[Segment]] = []
    size = 0
    for file in files:
        for segment in _segments(file.path, reading, part_bytes):
            if not parts or size + segment.size > part_bytes:
                parts.append([])
                size = 0
            parts[-1].append(segment)
            size += segment.size
    return tuple(Part(number, tuple(segments)) for number, segments in enumerate(parts))


def _segments(path: AnyFile, reading: Reading, part_bytes: int) -> Iterator[Segment]:
    size = path.stat().st_size
    if kind_of(path) == ".parquet":
        yield from _row_groups(path, reading.text_key, part_bytes)
    elif size and reading.has_ranges(path):
        for start in range(0, size, part_bytes):
            stop = min(start + part_bytes, size)
            yield Segment(path, start, stop, stop - start)
    else:
        yield Segment(path, 0, None, _text_size(path))


def _text_size(path: AnyFile) -> int:
    return path.stat().st_size * (_EXPANSION if path.suffix.lower() in COMPRESSED else 1)


def _row_groups(path: AnyFile, text_key: str, part_bytes: int) -> Iterator[Segment]:
    import pyarrow

    try:
        with parquet_file(path) as opened:
            found = opened.metadata
        names = [found.schema.column(i).path for i in range(found.num_columns)]
        column = names.index(text_key)
    except (pyarrow.ArrowException, OSError, ValueError):  # reading it says what is wrong
        yield Segment(path, 0, None, path.stat().st_size)
        return
    start, size = 0, 0
    for group in range(found.num_row_groups):
        own = found.row_group(group).column(column).total_uncompressed_size
        if size and size + own > part_bytes:
            yield Segment(path, start, group, size)
            start, size = group, 0
        size += own
    if size:
        yield Segment(path, start, found.num_row_groups, size)


def settings_of(
    files: Sequence[File], reading: Reading, part_bytes: int, **others: Any
) -> dict[str, Any]:
    """Return everything that determines the shards' bytes.

    Files count by name and size: the same files in another folder are the same input.
    """
    listed = [[file.name, file.path.stat().st_size] for file in files]
    return {
        "version": VERSION,
        "files": len(files),
        "bytes": sum(size for _, size in listed),
        "names_and_sizes": fingerprint(json.dumps(listed))[:32],
        "part_bytes": part_bytes,
        **vars(reading),
        **others,
    }


def key_of(settings: dict[str, Any]) -> str:
    """Return the digest of settings."""
    return fingerprint(json.dumps(settings, sort_keys=True))
