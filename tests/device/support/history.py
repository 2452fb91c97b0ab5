"""What guests have done to a disk, sector by sector, and what it may hold after a power loss.

A sector's *version* is 0 as it was made (the image's bytes), then counts its writes: who writes a
sector is one thread, one write at a time, so versions have an order. A mark in the disk's log says
how far a guest had got when the log had got there:

    at least   the version that was complete before a flush began that had completed by then
    at most    the version that had been sent by then
"""

from __future__ import annotations

import itertools
import struct
import threading
from array import array
from collections import defaultdict
from typing import TYPE_CHECKING

from support.direct import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

JUNK = -1
_HEAD = struct.Struct("<IIQ")
_TAG = 0x55424921


def content(sector: int, version: int) -> bytes:
    """What a guest writes, version 1 or later: it is nowhere and never twice the same."""
    return _HEAD.pack(_TAG, sector, version) * (SECTOR // _HEAD.size)


class Codec:
    """Bytes of a disk to versions and back."""

    def __init__(self, first: bytes) -> None:
        self.first = first             # what the disk showed when it was new

    def versions(self, offset: int, data: bytes) -> list[int]:
        """The version of each sector's content; JUNK for what never belonged there."""
        if data == self.first[offset : offset + len(data)]:
            return [0] * (len(data) // SECTOR)
        return [self._version(offset + at, data[at : at + SECTOR])
                for at in range(0, len(data), SECTOR)]

    def _version(self, offset: int, data: bytes) -> int:
        tag, sector, version = _HEAD.unpack_from(data)
        if tag == _TAG and sector == offset // SECTOR and data == content(sector, version):
            return version
        return 0 if data == self.first[offset : offset + SECTOR] else JUNK

    def bytes_of(self, first_sector: int, versions: array[int], junk: bytes) -> bytes:
        """Content of sectors that have these versions."""
        if not any(versions):
            start = first_sector * SECTOR
            return self.first[start : start + len(versions) * SECTOR]
        return b"".join(
            junk if version == JUNK
            else content(sector, version) if version
            else self.first[sector * SECTOR : (sector + 1) * SECTOR]
            for sector, version in enumerate(versions, first_sector)
        )


class History:
    """Writes as they are sent, complete, and are covered by flushes. For many threads."""

    def __init__(self, sectors: int, mark: Callable[[], int]) -> None:
        self.sent = array("i", bytes(4 * sectors))         # last version sent
        self.done = array("i", bytes(4 * sectors))         # … and complete
        # By mark: (sector, version) that are durable from then on, or may be there from then on.
        self.durable: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.possible: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._mark = mark
        self._lock = threading.Lock()
        self._complete: list[tuple[int, int]] = []
        self._covered = 0
        self._last_mark = 0

    def send(self, first: int, count: int) -> list[int]:
        """Before a write: the versions that it makes."""
        with self._lock:
            versions = []
            for sector in range(first, first + count):
                self.sent[sector] += 1
                versions.append(self.sent[sector])
                self.possible[self._last_mark].append((sector, self.sent[sector]))
        return versions

    def complete(self, first: int, versions: list[int], *, durable: bool) -> None:
        """After a write; a durable one is so from now on, as a mark says."""
        sectors = list(zip(itertools.count(first), versions))
        with self._lock:
            for sector, version in sectors:
                self.done[sector] = version
            self._complete += sectors
        if durable:
            self._marked(sectors)

    def flush_begins(self) -> int:
        """To be given to flush_ends."""
        with self._lock:
            return len(self._complete)

    def flush_ends(self, begun: int) -> None:
        with self._lock:
            covered = self._complete[self._covered : begun]
            self._covered = max(self._covered, begun)
        self._marked(covered)

    def _marked(self, durable: list[tuple[int, int]]) -> None:
        number = self._mark()
        with self._lock:
            self.durable[number] += durable
            self._last_mark = max(self._last_mark, number)
