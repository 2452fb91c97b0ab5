"""What the image and the base have in common: one open regular file or block device.

Invariants of every descriptor that leaves this package's openers:
- O_NONBLOCK is off. It is on while a file is opened (a FIFO must not hang the open), but io_uring
  would take it as "never wait" and fail requests with -EAGAIN.
- O_NOATIME is on where the kernel lets us (the file is ours, or CAP_FOWNER): reading an image
  writes nothing.
- O_DIRECT is on only where one aligned read has been shown or promised to work.
- O_CLOEXEC is on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import uuid
from typing import TYPE_CHECKING, Literal, NamedTuple

from . import blockdev
from .errors import Exit, UbiError
from .sizes import human_size

if TYPE_CHECKING:
    from collections.abc import Callable

Role = Literal["image", "base"]

SECTOR_SIZE = 512
# struct statx of <linux/stat.h>; tests compare these with the C header
STATX_DIOALIGN = 0x2000
STATX_DIO_READ_ALIGN = 0x20000
STATX_SIZE = 256
STATX_DIO_MEM_ALIGN_OFFSET = 152
STATX_DIO_OFFSET_ALIGN_OFFSET = 156
STATX_DIO_READ_OFFSET_ALIGN_OFFSET = 180
AT_EMPTY_PATH = 0x1000

_PROBED_ALIGNMENTS = (512, 1024, 2048, 4096)
# <linux/magic.h>: EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC
_DIRECT_FILESYSTEMS = (0xEF53, 0x58465342)
_STATFS_SIZE = 256                 # more than struct statfs has, of which f_type is the first word
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}


class Identity(NamedTuple):
    """Which file or device this is, for as long as the machine runs.

    A file: (False, st_dev, st_ino). A block device: (True, st_rdev, disk sequence number); the
    number tells a device from the next one of the same name, and is 0 before Linux 5.15.
    """

    is_block: bool
    device: int
    number: int


def shown(path: str) -> str:
    """Return `path` as it may stand in a one-line message."""
    return path if path and path.isprintable() else repr(path)


def size_text(size: int) -> str:
    """Return a number of bytes, exactly and for the eye."""
    return f"{size} bytes ({human_size(size)})" if size >= 1024 else f"{size} bytes"


def uuid_text(raw: bytes) -> str:
    """Return the form in which people are told of a UUID."""
    return str(uuid.UUID(bytes=raw))


def check_path(role: Role, path: str) -> None:
    """Refuse a path that no file can have; the system would answer with a ValueError."""
    if not path or "\0" in path:
        raise UbiError(f"{role} {path!r} is not a path: name a file or block device", Exit.USAGE)


def check_kind(role: Role, path: str, mode: int) -> bool:
    """Refuse everything but regular files (False) and block devices (True)."""
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return stat.S_ISBLK(mode)
    kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
    example = f", such as {shown(os.path.join(path, 'disk.raw'))}" if stat.S_ISDIR(mode) else ""
    raise UbiError(f"{role} {shown(path)} is {kind}: name a regular file or block device{example}")


def open_failure(role: Role, path: str, error: OSError) -> UbiError:
    """Return the refusal for an error of stat(2) or open(2) on `path`."""
    what = f"{role} {shown(path)}"
    number = error.errno or 0
    if number == errno.ENOENT:
        with contextlib.suppress(OSError):
            target = os.readlink(path)
            return UbiError(
                f"{what} is a link to {shown(target)}, which does not exist: mend the link, or "
                f"name the {role} itself",
            )
        return UbiError(f"{what} does not exist: check the path")
    code = Exit.BUSY if number in (errno.EBUSY, errno.ETXTBSY) else Exit.FAILED
    access = "read" if role == "image" else "read and written"
    reasons = {
        errno.EACCES: f"may not be {access} by uid {os.geteuid()}: run as root, or allow it with "
        "chmod or chown",
        errno.ENOTDIR: "is not there: a part of its path is a file, not a folder; check the path",
        errno.ELOOP: "goes round in a circle of symbolic links: name the file itself",
        errno.ENAMETOOLONG: "has too long a name: use a shorter path",
        errno.ENXIO: "has no device behind it: attach the device first",
        errno.ENODEV: "has no device behind it: attach the device first",
        errno.ENOMEDIUM: "has no medium in it: insert one, or name another device",
        errno.EROFS: "is on a read-only filesystem: remount it read-write, or name another place",
        errno.ETXTBSY: "is being run as a program or used as swap: name another file",
        errno.EWOULDBLOCK: "is leased to another program (a file server?): stop that first",
    }
    reason = reasons.get(number, f"cannot be opened: {error.strerror}; check the path")
    return UbiError(f"{what} {reason}", code)


def identity_of(fd: int, st: os.stat_result) -> Identity:
    """Return the identity of an open regular file or block device."""
    if stat.S_ISBLK(st.st_mode):
        return Identity(is_block=True, device=st.st_rdev, number=blockdev.disk_sequence(fd))
    return Identity(is_block=False, device=st.st_dev, number=st.st_ino)


def size_of(fd: int) -> int:
    """Return the size in bytes of an open file or block device (whose st_size is 0)."""
    st = os.fstat(fd)
    return blockdev.size(fd) if stat.S_ISBLK(st.st_mode) else st.st_size


def reopen(fd: int, flags: int) -> int:
    """Return a new open file description of the file behind `fd`, whatever its path is by now."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def holds_data(fd: int, offset: int) -> bool:
    """Tell whether a file may have anything but zeros from `offset` on, in bytes.

    What is no hole may; so may all of a file on a filesystem that does not tell.
    """
    try:
        block = max(os.fstat(fd).st_blksize, 1)  # a filesystem has holes of whole blocks
        within = -offset % block
        if within and _has_nonzero(fd, offset, within):
            return True
        os.lseek(fd, offset + within, os.SEEK_DATA)
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def _has_nonzero(fd: int, offset: int, length: int) -> bool:
    """Look at a few bytes, of no particular alignment."""
    buffered = reopen(fd, os.O_RDONLY)
    try:
        return any(os.pread(buffered, length, offset))
    finally:
        os.close(buffered)


def make_ready(fd: int) -> None:
    """Let requests on `fd` wait, and leave its access time alone; see this file's invariants."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NOATIME)
    except PermissionError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def enable_direct(fd: int) -> int:
    """Turn O_DIRECT on; return the alignment in bytes of offsets, lengths and memory, or 0.

    0 means that the file has no O_DIRECT (hostfs, encrypted or journalled files, tmpfs before
    Linux 6.6): it is left buffered. The flag is set after the open, as an open that creates a
    file and is then refused for O_DIRECT leaves the file behind.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return 0
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return blockdev.logical_block_size(fd)
    alignment = _stated_alignment(fd)
    if alignment is None:
        alignment = _probed_alignment(fd)
    if alignment == 0:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return alignment


def direct_alignment(fd: int) -> int:
    """Return the bytes of what is written past the page cache for sure, whole; 0: nothing is.

    The file has O_DIRECT. Many a filesystem takes the flag and writes through the page cache after
    all: btrfs what has checksums (since Linux 6.15), tmpfs everything, XFS parts of blocks that
    files share (xfs_file_write_iter). Block devices never do.
    """
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return 1
    return os.fstatvfs(fd).f_bsize if _filesystem(fd) in _DIRECT_FILESYSTEMS else 0


def _filesystem(fd: int) -> int | None:
    """Return the magic number of the filesystem that a file is on (statfs(2))."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) != 0:
        return None
    return int(ctypes.c_long.from_buffer(buffer).value)


def _statx() -> Callable[..., int] | None:
    """Return statx(2) of the C library; None where it is older than the call."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint,
                         ctypes.c_void_p)
    function.restype = ctypes.c_int
    result: Callable[..., int] = function
    return result


def _stated_alignment(fd: int) -> int | None:
    """Return what STATX_DIOALIGN (Linux 6.1) says: bytes, 0 for "no direct I/O", None if mute.

    Of reads, where STATX_DIO_READ_ALIGN (6.15) tells: once a file on XFS shares blocks with another
    (`cp` makes it so) whole filesystem blocks are asked for in writes. Smaller ones work all the
    same, through the page cache (xfs_report_dioalign), and a disk whose blocks grow when somebody
    copies its image or base is of no use to its guest.
    """
    statx = _statx()
    buffer = ctypes.create_string_buffer(STATX_SIZE)
    mask = STATX_DIOALIGN | STATX_DIO_READ_ALIGN
    if statx is None or statx(fd, b"", AT_EMPTY_PATH, mask, ctypes.addressof(buffer)):
        return None

    def field(offset: int) -> int:
        return int.from_bytes(buffer.raw[offset : offset + 4], "little")

    if not field(0) & STATX_DIOALIGN:
        return None
    if (in_file := field(STATX_DIO_OFFSET_ALIGN_OFFSET)) == 0:
        return 0
    if field(0) & STATX_DIO_READ_ALIGN:
        in_file = field(STATX_DIO_READ_OFFSET_ALIGN_OFFSET)
    return max(in_file, field(STATX_DIO_MEM_ALIGN_OFFSET), SECTOR_SIZE)


def _probed_alignment(fd: int) -> int:
    """Return the smallest length that an O_DIRECT read at 0 takes; 0 when none does."""
    # not closed by hand: the slice below may still hold it, and a failed close would mask an error
    page = mmap.mmap(-1, mmap.PAGESIZE)
    for length in _PROBED_ALIGNMENTS:
        try:
            os.preadv(fd, [memoryview(page)[:length]], 0)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                continue
            # a bad medium says nothing about alignment; who reads next reports it
        return length
    return 0
