"""The table: which stripes the base has, known before their header bits are durable.

One file a running device on tmpfs (docs/durability.md): it outlives the process and dies with the
kernel, which is just what "every completed write survives a killed daemon" needs and no more.

    0     identity, sealed with a CRC-32: whose table it is (Identity)
    256   latch: errno of the first failed fdatasync, or 0; shared with the data plane
    4096  rows: a byte a stripe, 1 when the base has it; written by the hydrator alone

Invariants
- A table that a daemon uses is locked (flock) by it. Locked tables are never touched.
- A table is made under a temporary name and renamed when the base names its generation; nothing is
  ever renamed over another table.
- What a found table says is judged by the lifecycle engine, not here.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from ublk_ubi.errors import Exit, UbiError

MAGIC = b"UBITABLE"
VERSION = 1
HEADER_BYTES = 4096
LATCH_OFFSET = 256
# Magic, version, CRC-32 (of the sealed part with this field zero), then the identity.
_SEAL = struct.Struct("<8sII")
_IDENTITY = struct.Struct("<16s32sQQQQII")
_SEALED_BYTES = _SEAL.size + _IDENTITY.size


class Identity(NamedTuple):
    """Whose table it is. Sizes are bytes; `device`, `inode`: st_dev, st_ino of a file, rdev and
    disk sequence of a block device."""  # noqa: D205, D209

    uuid: bytes
    fingerprint: bytes
    generation: int
    device: int
    inode: int
    image_bytes: int
    stripe_bytes: int
    image_stripes: int


class TableState(enum.Enum):
    """What is at a table's path."""

    NONE = "none"
    FOUND = "found"
    LIVE = "live"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class FoundTable:
    """A table file as it was found; `identity` and `latch` are set when the state is FOUND."""

    state: TableState
    identity: Identity | None = None
    latch: int = 0


class Table:
    """A mapped and locked table. `rows` is writable memory, `latch_address` an aligned uint32."""

    def __init__(self, fd: int, identity: Identity) -> None:
        """Take over `fd`, which holds the lock, and map the file. Raises OSError."""
        self.identity = identity
        self._fd = fd
        self._map = mmap.mmap(fd, HEADER_BYTES + identity.image_stripes)
        # A page of it that had to be read in could wait for this very device.
        latch = ctypes.c_uint32.from_buffer(self._map, LATCH_OFFSET)
        self.latch_address = ctypes.addressof(latch)
        _lock_memory(self.latch_address - LATCH_OFFSET, len(self._map))
        self.rows = memoryview(self._map)[HEADER_BYTES:]

    def close(self) -> None:
        """Let go of the lock; the memory stays mapped as long as the data plane points into it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class TableHost:
    """The table calls of the lifecycle engine, for one base, in one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.table: Table | None = None

    @property
    def path(self) -> str | None:
        """The path of the table in use."""
        return self._path(self.table.identity.uuid) if self.table else None

    def find_table(self, uuid: bytes) -> tuple[FoundTable, FoundTable]:
        """Look at the table of a UUID, and at one under its temporary name."""
        return look(self._path(uuid)), look(self._temporary(uuid))

    def drop_table(self, uuid: bytes) -> None:
        """Remove what is there under both names. Raises OSError."""
        for path in (self._path(uuid), self._temporary(uuid)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def make_table(self, identity: Identity) -> Table:
        """Make a table under its temporary name, all rows 0. Raises UbiError (busy), OSError."""
        path = self._temporary(identity.uuid)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise UbiError(
                f"another device is opening the base with UUID {identity.uuid.hex()}: wait for it, "
                "or open the other copy of that disk later",
                Exit.BUSY,
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, HEADER_BYTES + identity.image_stripes)
            os.pwrite(fd, _pack(identity), 0)
            self.table = Table(fd, identity)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        return self.table

    def map_table(self, identity: Identity) -> Table:
        """Take over the table that was found. Raises UbiError (busy) if another was faster."""
        fd = os.open(self._path(identity.uuid), os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.table = Table(fd, identity)
        except BlockingIOError:
            os.close(fd)
            raise UbiError(
                f"the table of UUID {identity.uuid.hex()} is in use by a running device",
                Exit.BUSY,
            ) from None
        except BaseException:
            os.close(fd)
            raise
        return self.table

    def publish_table(self) -> None:
        """Give the new table its name. Raises UbiError (busy) if another took it meanwhile."""
        if self.table is None:
            raise RuntimeError("a table is made before it is published")
        uuid = self.table.identity.uuid
        try:
            os.link(self._temporary(uuid), self._path(uuid))
        except FileExistsError:
            raise UbiError(
                f"another device with UUID {uuid.hex()} went live meanwhile: its base is a copy",
                Exit.BUSY,
            ) from None
        os.unlink(self._temporary(uuid))

    def unlink_table(self) -> None:
        """Remove the table in use: its base is closed."""
        if self.table is None:
            raise RuntimeError("a table is there until it is unlinked")
        self.drop_table(self.table.identity.uuid)

    def _path(self, uuid: bytes) -> str:
        return os.path.join(self._folder, uuid.hex())

    def _temporary(self, uuid: bytes) -> str:
        return self._path(uuid) + ".new"


def look(path: str) -> FoundTable:
    """Read a table file without touching it. Raises OSError on anything but its absence."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return FoundTable(TableState.NONE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        head = os.pread(fd, HEADER_BYTES, 0)
        identity = _unpack(head)
        if identity is None or os.fstat(fd).st_size != HEADER_BYTES + identity.image_stripes:
            return FoundTable(TableState.DAMAGED)
        (latch,) = struct.unpack_from("<I", head, LATCH_OFFSET)
        return FoundTable(TableState.FOUND, identity, latch)
    except BlockingIOError:
        return FoundTable(TableState.LIVE)
    finally:
        os.close(fd)


def _pack(identity: Identity) -> bytes:
    body = _IDENTITY.pack(*identity)
    crc = zlib.crc32(_SEAL.pack(MAGIC, VERSION, 0) + body)
    return _SEAL.pack(MAGIC, VERSION, crc) + body


def _unpack(head: bytes) -> Identity | None:
    """Return the identity, or None when it is not one of this version, whole."""
    if len(head) < HEADER_BYTES:
        return None
    identity = Identity(*_IDENTITY.unpack_from(head, _SEAL.size))
    return identity if head[:_SEALED_BYTES] == _pack(identity) else None


def _lock_memory(address: int, length: int) -> None:
    """mlock(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EPERM, errno.ENOMEM):
            raise OSError(number, f"cannot lock the table in memory: {os.strerror(number)}")
