"""Documents of many megabytes: cut into pieces, never decoded as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: A JSON string of more bytes than this is read in pieces.
LONG_STRING = 1 << 20
_BLANKS = b" \t\r\n"
_ESCAPE = 6  # bytes of \u0000
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a document, or a piece of a long one.

    Attributes:
        text: The text.
        data: The same as UTF-8.
        ends: Whether the document ends with it.
    """

    text: str
    data: bytes
    ends: bool = True


def pieces(read: Callable[[int], bytes], limit: int) -> Iterator[Piece]:
    """Yield a document in pieces of at most `limit` bytes; none where it has blanks only.

    Args:
        read: Returns the next bytes of its UTF-8, fewer than asked at its end alone.
        limit: Largest piece, in bytes.

    Raises:
        UnicodeDecodeError: It is not UTF-8; `start` is the byte of the document.
    """
    at, data = 0, read(limit + 1)
    try:
        while len(data) > limit:
            size = cut(data, limit)
            yield Piece(data[:size].decode(), data[:size], ends=False)
            at, data = at + size, data[size:] + read(size)
        text = data.decode()
        if at or (text and not text.isspace()):
            yield Piece(text, data)
    except UnicodeDecodeError as error:
        error.start += at
        raise


def cut(data: bytes, limit: int) -> int:
    """Return where to cut text of more than `limit` bytes, at or before `limit`.

    After a line, best one between two letters: tokenizers that split text at white space give the
    same tokens for such pieces as for the whole.
    """
    lowest, end, fallback = limit // 2, limit, 0
    while (end := data.rfind(b"\n", lowest, end)) >= 0:
        around = data[end - 1 : end] + data[end + 1 : end + 2]
        if len(around.strip(_BLANKS)) == 2:
            return end + 1
        fallback = fallback or end + 1
    if fallback:
        return fallback
    if (space := data.rfind(b" ", lowest, limit)) > 0:
        return space
    return _character(data, limit)


class JsonString:
    """A stream of the UTF-8 of a string in JSON.

    Args:
        line: The JSON.
        start: First byte of the string, behind its quotation mark.
        stop: Its closing quotation mark.
    """

    def __init__(self, line: bytes, start: int, stop: int) -> None:
        self.line, self.at, self.stop = line, start, stop
        self._read = bytearray()

    def read(self, size: int) -> bytes:
        """Return the next bytes, fewer than `size` at the end alone.

        Raises:
            ValueError: It is not UTF-8, has a bad escape or half of a surrogate pair.
        """
        while len(self._read) < size and self.at < self.stop:
            end = self._whole(min(self.at + LONG_STRING, self.stop))
            try:
                self._read += json.loads(b'"%b"' % self.line[self.at : end]).encode()
            except ValueError as error:
                reason = getattr(error, "msg", "") or getattr(error, "reason", "")
                text = f"a string that is no text at bytes {self.at} to {end} of the line: {reason}"
                raise ValueError(text) from error
            self.at = end
        found = bytes(self._read[:size])
        del self._read[:size]
        return found

    def _whole(self, end: int) -> int:
        """Return the last position up to `end` that is not within a character or an escape."""
        if end == self.stop:
            return end
        end = self._unescaped(_character(self.line, end))
        if _HIGH_SURROGATE.fullmatch(self.line, end - _ESCAPE, end):  # its low one follows
            end = self._unescaped(end - _ESCAPE)
        return end

    def _unescaped(self, end: int) -> int:
        slash = self.line.rfind(b"\\", end - _ESCAPE + 1, end)
        if slash < 0 or _escaped(self.line, slash):
            return end
        size = _ESCAPE if self.line[slash + 1 : slash + 2] == b"u" else 2
        return end if slash + size <= end else slash


def without_long_strings(line: bytes) -> tuple[bytes, dict[str, JsonString]]:
    """Return JSON with a short string in place of each long one, and the long ones by these."""
    found: dict[str, JsonString] = {}
    parts, done, at = list[bytes](), 0, 0
    while (quote := line.find(b'"', at)) >= 0:
        end = quote
        while (end := line.find(b'"', end + 1)) >= 0 and _escaped(line, end):
            pass
        if end < 0:
            break
        if end - quote > LONG_STRING:
            name = f"long string {len(found)} at byte {quote}"
            found[name] = JsonString(line, quote + 1, end)
            parts += [line[done : quote + 1], name.encode()]
            done = end
        at = end + 1
    return b"".join([*parts, line[done:]]), found


def _escaped(line: bytes, at: int) -> bool:
    """Return whether an odd number of backslashes stands before a byte."""
    first = at
    while first and line[first - 1] == 0x5C:
        first -= 1
    return (at - first) % 2 == 1


def _character(data: bytes, at: int) -> int:
    """Return the first byte of the character of UTF-8 that the byte at `at` belongs to."""
    first = at
    while first > at - 4 and data[first] & 0xC0 == 0x80:
        first -= 1
    return first
