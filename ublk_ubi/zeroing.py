"""Zeroing ranges of a new base from the control side: nothing here is on the I/O path."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from ublk_ubi import blockdev

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
_CHUNK = 1 << 20


def zero(fd: int, offset: int, length: int, *, is_block: bool) -> None:
    """Make `length` bytes from `offset` read as zeros: BLKZEROOUT, or a hole in a file.

    Both in bytes, multiples of what direct I/O takes. Where a filesystem has no holes (NFS before
    4.2, FAT), zeros are written. Raises OSError.
    """
    if is_block:
        blockdev.zero_out(fd, offset, length)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number != errno.EOPNOTSUPP:
            raise OSError(number, os.strerror(number))
        _write_zeros(fd, offset, length)


def _write_zeros(fd: int, offset: int, length: int) -> None:
    zeros = memoryview(mmap.mmap(-1, _CHUNK))  # aligned
    while length:
        written = os.pwrite(fd, zeros[: min(length, _CHUNK)], offset)
        offset, length = offset + written, length - written


def offloaded(fd: int) -> bool:
    """Tell whether a block device zeroes by itself, so that a large range takes no time."""
    rdev = os.fstat(fd).st_rdev
    node = os.path.realpath(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
    # A partition has no queue of its own.
    for folder in (node, os.path.dirname(node)):
        try:
            with open(os.path.join(folder, "queue/write_zeroes_max_bytes"), "rb") as file:
                return int(file.read()) > 0
        except (FileNotFoundError, NotADirectoryError):
            continue
    return False
