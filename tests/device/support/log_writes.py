"""The log of dm-log-writes: what reached a disk, in which order, between which flushes.

Written from drivers/md/dm-log-writes.c. A log is a sequence of records, each in a sector of its own
and followed by its data; the first sector says how many there are and how large a sector is.

    0      superblock: magic, version, number of records, bytes of a sector
    then   record: sector, sectors, flags, length of the mark; a mark's text is in the same sector

What the order means. A write is put down when a flush *that was sent after its completion*
completes, just before the record of that flush. So everything before a flush's record is durable
once that record is there; any part of the writes before the next flush may be.

The target gives the writes that two flushes cover to the one that was sent first, and puts them
down when that one completes. Were the other to complete before it, what it promised would be
missing from the log for a while. So flushes must come one after the other: a loop device on top
sees to that, as every disk with a request queue does (block/blk-flush.c: one flush at a time). It
also makes a write and a flush of a write with FUA.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.direct import SECTOR, DirectFile, block_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.mapper import Mapped
    from support.stores import Stores

MAGIC = 0x6A736677736872
VERSION = 1
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
END = "dm-log-writes-end"

_SUPER = struct.Struct("<QQQI")
_RECORD = struct.Struct("<QQQQ")
_CHUNK = 1 << 20
# struct dm_ioctl, and a message behind it: linux/dm-ioctl.h.
_DM_IOCTL = struct.Struct("<3I7IQ128s129s7x")
_DM_TARGET_MSG = 3 << 30 | _DM_IOCTL.size << 16 | 0xFD << 8 | 14


@dataclass(frozen=True)
class Record:
    """Something that happened to the disk. Offsets are bytes of the disk."""

    offset: int
    data: bytes
    flags: int
    mark: str

    @property
    def is_flush(self) -> bool:
        return bool(self.flags & FLUSH)

    @property
    def is_mark(self) -> bool:
        return bool(self.flags & MARK)


class LoggedDisk:
    """A mapped disk whose writes go into a log on another disk, from now until `stop`.

    `path` is the disk to be used: the loop device on top.
    """

    def __init__(self, disk: Mapped, log: str, stores: Stores) -> None:
        self.disk = disk
        self.log = log
        self._lock = threading.Lock()
        self._control = os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC)
        self.marks = 0
        disk.table(f"0 {disk.sectors} log-writes {disk.below} {log}")
        self.path = stores.loop_over(disk.path, "--direct-io=on")

    def mark(self) -> int:
        """Put the next number into the log: all that has completed is before it."""
        with self._lock:
            number = self.marks + 1
            self._message(f"mark {number}")
            self.marks = number
        return number

    def stop(self) -> None:
        """Be a plain disk again; the log is whole then."""
        self.disk.linear()
        os.close(self._control)

    def _message(self, text: str) -> None:
        """Tell the target; `dmsetup message` without a process."""
        body = struct.pack("<Q", 0) + text.encode() + b"\0"
        size = _DM_IOCTL.size + len(body)
        head = _DM_IOCTL.pack(
            4, 0, 0, size, _DM_IOCTL.size, 0, 0, 0, 0, 0, 0, self.disk.name.encode(), b"",
        )
        fcntl.ioctl(self._control, _DM_TARGET_MSG, bytearray(head + body))


def read_log(path: str) -> Iterator[Record]:
    """All records in their order; AssertionError for a log that is not whole."""
    with DirectFile(path, os.O_RDONLY) as file:
        reader = _Reader(file, block_size(path))
        magic, version, count, sector = _SUPER.unpack_from(reader.take(0, SECTOR))
        assert (magic, version) == (MAGIC, VERSION), f"{path}: no log: {magic:#x}, {version}"
        assert sector == SECTOR, f"{path}: sectors of {sector} bytes"
        at, record = SECTOR, None
        for _ in range(count):
            head = reader.take(at, SECTOR)
            first, sectors, flags, length = _RECORD.unpack_from(head)
            assert not flags & DISCARD, "a discard has no data to replay"
            assert not flags & FUA, "a loop device sends none"
            text = head[_RECORD.size :][:length].decode() if flags & MARK else ""
            data = reader.take(at + SECTOR, sectors * SECTOR)
            at += SECTOR + len(data)
            record = Record(first * SECTOR, data, flags, text)
            yield record
        assert record is not None
        assert record.mark == END, f"{path}: the log is cut short: was it full?"


class _Reader:
    """Reads a disk in large pieces."""

    def __init__(self, file: DirectFile, size: int) -> None:
        self._file = file
        self._size = size
        self._start = 0
        self._piece = b""

    def take(self, offset: int, length: int) -> bytes:
        if offset < self._start or offset + length > self._start + len(self._piece):
            self._start = offset
            self._piece = self._file.pread(offset, min(max(length, _CHUNK), self._size - offset))
        at = offset - self._start
        return self._piece[at : at + length]


assert _DM_IOCTL.size == 312
assert ctypes.sizeof(ctypes.c_void_p) == 8
