"""Direct I/O on files and devices, from Python: aligned memory, whole transfers, exact words."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

SECTOR = 512
CHUNK = 1 << 20


class DirectFile:
    """A file or block device open with O_DIRECT. Offsets and lengths are multiples of its sector.

    For one thread: reads share one aligned buffer.
    """

    def __init__(self, path: str, flags: int = os.O_RDWR) -> None:
        self.path = path
        self.fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
        self._buffer = mmap.mmap(-1, CHUNK)
        self._view = memoryview(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def pread(self, offset: int, length: int) -> bytes:
        pieces = []
        while length > 0:
            count = os.preadv(self.fd, [self._view[: min(length, CHUNK)]], offset)
            assert count > 0, f"{self.path}: it ends at byte {offset}"
            pieces.append(self._buffer[:count])
            offset += count
            length -= count
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pwrite(self, data: bytes, offset: int) -> None:
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            self._buffer[: len(piece)] = piece
            count = os.pwritev(self.fd, [self._view[: len(piece)]], offset + start)
            assert count == len(piece), f"{self.path}: {count} of {len(piece)} bytes written"

    def fsync(self) -> None:
        os.fsync(self.fd)


def read_direct(path: str, offset: int, length: int) -> bytes:
    """Read from a device or file past every cache."""
    with DirectFile(path, os.O_RDONLY) as file:
        return file.pread(offset, length)


def block_size(path: str) -> int:
    """The size of a block device in bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def assert_same(found: bytes, expected: bytes, offset: int, what: str) -> None:
    """Compare; the first sector that differs is named by its byte in the device."""
    if found == expected:
        return
    assert len(found) == len(expected), f"{what}: {len(found)} bytes, not {len(expected)}"
    bad = [
        at for at in range(0, len(found), SECTOR)
        if found[at : at + SECTOR] != expected[at : at + SECTOR]
    ]
    first = bad[0]
    raise AssertionError(
        f"{what}: {len(bad)} sectors of {len(found) // SECTOR} differ, the first at byte "
        f"{offset + first} ({(offset + first) >> 16} × 64K + {(offset + first) & 0xFFFF}), "
        f"the last at {offset + bad[-1]}: found {found[first:first + 16].hex()}, "
        f"expected {expected[first:first + 16].hex()}",
    )


def assert_content(path: str, expected: bytes | bytearray | mmap.mmap, what: str) -> None:
    """Compare all of a device or file, read directly, with what it should hold."""
    length = len(expected)
    with DirectFile(path, os.O_RDONLY) as file:
        for offset in range(0, length, CHUNK):
            count = min(CHUNK, length - offset)
            assert_same(
                file.pread(offset, count), bytes(expected[offset : offset + count]), offset, what,
            )
