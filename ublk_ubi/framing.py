"""Cuts a byte stream into JSON texts, as they come: concatenated, with or without white space.

Only nesting and strings are followed here; whether a text is JSON at all, its decoder says.
"""

from __future__ import annotations

import re

from ublk_ubi.errors import UbiError

MAX_DEPTH = 32

_SPACE = re.compile(rb"[ \t\r\n]*")
_BRACKET = re.compile(rb'["{}\[\]]')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # up to its end or half an escape
_OPENING = b"{["


class FramingError(UbiError):
    """The stream cannot be cut into texts any more: there is nothing to resume from."""


class Framer:
    """Collects bytes and gives them back one JSON object or array at a time.

    Holds at most `limit` bytes if the caller feeds no more than `room`; a byte is looked at once,
    however the stream is cut.
    """

    def __init__(self, limit: int) -> None:
        assert limit > 0
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False

    @property
    def room(self) -> int:
        """Bytes that may be fed now; 0 while texts wait to be taken."""
        return self._limit - len(self._buffer)

    @property
    def partial(self) -> bool:
        """Whether a text has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Take the next whole text, None if there is none yet.

        Raises FramingError for bytes that begin no object or array, a text over `limit` and one
        nested deeper than MAX_DEPTH.
        """
        if self._depth == 0 and not self._starts_text():
            return None
        end = self._scan()
        if end is None:
            if len(self._buffer) >= self._limit:
                raise FramingError(f"a request is larger than {self._limit} bytes")
            return None
        text = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._scanned = 0
        return text

    def _starts_text(self) -> bool:
        """Drop white space between texts; tell whether one begins."""
        space = _SPACE.match(self._buffer)
        assert space is not None
        length = space.end()
        del space  # it pins the buffer's size
        del self._buffer[:length]
        self._scanned = 0
        if not self._buffer:
            return False
        if self._buffer[0] not in _OPENING:
            raise FramingError("not a JSON object")
        return True

    def _scan(self) -> int | None:
        """Go on from where the last scan stopped; the text's length when its end is found."""
        position, end = self._scanned, None
        while end is None:
            if self._in_string:
                body = _STRING.match(self._buffer, position)
                assert body is not None
                position = body.end()
                if self._buffer[position : position + 1] != b'"':
                    break
                position += 1
                self._in_string = False
            found = _BRACKET.search(self._buffer, position)
            if found is None:
                position = len(self._buffer)
                break
            mark, position = found[0], found.end()
            if mark == b'"':
                self._in_string = True
            elif mark in (b"{", b"["):
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise FramingError(f"a request is nested deeper than {MAX_DEPTH} levels")
            else:
                self._depth -= 1
                end = position if self._depth == 0 else None
        self._scanned = position
        return end
