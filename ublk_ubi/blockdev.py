"""ioctls on an open block device.

Sources: <linux/fs.h>, <linux/loop.h>; tests compare every number and offset with the C headers.
Every function raises OSError as the kernel gives it, unless it says otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKPBSZGET = 0x127B
BLKZEROOUT = 0x127F
BLKGETSIZE64 = 0x80081272
BLKGETDISKSEQ = 0x80081280
FS_IOC_GETFLAGS = 0x80086601
FS_IMMUTABLE_FL = 0x10
FS_APPEND_FL = 0x20
LOOP_GET_STATUS64 = 0x4C05
# struct loop_info64
LOOP_INFO64_SIZE = 232
LOOP_INFO64_RDEVICE_OFFSET = 16


class LoopBacking(NamedTuple):
    """The file under a loop device, as stat(2) would give it."""

    st_dev: int
    st_ino: int
    st_rdev: int


def _query(fd: int, request: int, layout: str) -> int:
    """Return the one number that an ioctl answers with."""
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(layout)))
    return int(struct.unpack(layout, answer)[0])


def size(fd: int) -> int:
    """Return the device's size in bytes; stat(2) calls it 0."""
    return _query(fd, BLKGETSIZE64, "=Q")


def logical_block_size(fd: int) -> int:
    """Return the smallest unit in bytes that the device reads and writes."""
    return _query(fd, BLKSSZGET, "=i")


def physical_block_size(fd: int) -> int:
    """Return the unit in bytes that the device writes without reading first."""
    return _query(fd, BLKPBSZGET, "=I")


def is_read_only(fd: int) -> bool:
    """Tell whether writes are refused; opening it for writing may succeed all the same."""
    return _query(fd, BLKROGET, "=i") != 0


def disk_sequence(fd: int) -> int:
    """Return the number that no other disk of this boot has had; 0 before Linux 5.15.

    A partition answers with its disk's.
    """
    try:
        return _query(fd, BLKGETDISKSEQ, "=Q")
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return 0
        raise


def zero_out(fd: int, offset: int, length: int) -> None:
    """Zero a range in bytes, sector-aligned; the kernel writes zeros where it cannot offload."""
    assert offset >= 0
    assert length > 0
    fcntl.ioctl(fd, BLKZEROOUT, struct.pack("=QQ", offset, length))


def inode_flags(fd: int) -> int:
    """Return the file's FS_*_FL attributes; 0 where the filesystem has none."""
    try:
        return _query(fd, FS_IOC_GETFLAGS, "=Ixxxx")
    except OSError:
        return 0


def loop_backing(fd: int) -> LoopBacking:
    """Return what is under an open loop device; ENXIO when nothing is.

    Better than the path in sysfs, which is cut at a page, is of no use once that name is removed
    (the file may have others), and belongs to another mount namespace perhaps.
    """
    info = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO64_SIZE))
    device, inode, rdevice = struct.unpack_from("=QQQ", info)
    return LoopBacking(_decode_dev(device), inode, _decode_dev(rdevice))


def _decode_dev(number: int) -> int:
    """Turn the kernel's huge_encode_dev() into a dev_t of the C library."""
    return os.makedev((number >> 8) & 0xFFF, (number & 0xFF) | ((number >> 12) & 0xFFF00))
