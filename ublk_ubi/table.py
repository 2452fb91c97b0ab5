"""The table: which stripes the base has, known before their header bits are durable.

One file a running device on tmpfs (docs/durability.md): it outlives the process and dies with the
kernel, which is just what "every completed write survives a killed daemon" needs and no more.

    0     boot id and identity, sealed with a CRC-32: whose table it is (Identity)
    256   latch: errno of the first failed fdatasync, or 0; shared with the data plane
    4096  rows: a byte a stripe, 1 when the base has it; written by the hydrator alone

Invariants
- A table that a daemon uses is locked (flock) by it. Locked tables are never touched.
- A table is made under a temporary name and renamed when the base names its generation; nothing is
  ever renamed over another table.
- A table of another boot is no table: it goes when it is seen. tmpfs forgets it anyway; where /run
  is something else, its rows may be older than the base.
- What a found table says is judged by the lifecycle engine, not here.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import functools
import mmap
import os
import struct
import uuid
import zlib
from typing import NamedTuple

import msgspec

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.files import uuid_text

MAGIC = b"UBITABLE"
VERSION = 1
HEADER_BYTES = 4096
LATCH_OFFSET = 256
# Magic, version, CRC-32 (of the sealed part with this field zero), boot id, then the identity.
_SEAL = struct.Struct("<8sII16s")
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


class FoundTable(msgspec.Struct, frozen=True):
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

    @property
    def latched(self) -> int:
        """Give the errno of the first failed fdatasync, or 0."""
        return ctypes.c_uint32.from_address(self.latch_address).value

    def latch(self, number: int) -> None:
        """Note that an fdatasync of the base failed with errno `number`, unless one did before."""
        if not self.latched:
            ctypes.c_uint32.from_address(self.latch_address).value = number

    def close(self) -> None:
        """Let go of the lock; the memory stays mapped as long as the data plane points into it."""
        if self._fd >= 0:
            # The mapping holds a duplicate of the descriptor, so that closing alone frees nothing.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

    def is_at(self, path: str) -> bool:
        """Tell whether this table is what is at `path`."""
        return _is_at(self._fd, path)


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
        """Remove what is there under both names. Raises UbiError (busy) if it is used, OSError."""
        if self.table is not None:
            self.table.close()
            self.table = None
        for path in (self._path(uuid), self._temporary(uuid)):
            try:
                _remove(path)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise UbiError(
                    f"the table of UUID {uuid_text(uuid)} is in use by another device", Exit.BUSY,
                ) from None

    def drop_tables_of(self, device: int, inode: int) -> None:
        """Remove what is known of disks that were on a base which another has been made on.

        A table in use is of a copy elsewhere, whose base has that place's identity no more.
        """
        for entry in os.scandir(self._folder) if os.path.isdir(self._folder) else ():
            with contextlib.suppress(OSError):
                found = look(entry.path).identity
                if found is not None and (found.device, found.inode) == (device, inode):
                    _remove(entry.path)

    def make_table(self, identity: Identity) -> Table:
        """Make a table under its temporary name, all rows 0. Raises UbiError (busy; no room)."""
        path = self._temporary(identity.uuid)
        try:
            fd = _create(path)
        except FileExistsError:
            raise UbiError(
                f"another device is opening the base with UUID {uuid_text(identity.uuid)}: wait "
                "for it, or open the other copy of that disk later",
                Exit.BUSY,
            ) from None
        except OSError as error:
            raise _no_room(path, error) from None
        try:
            os.posix_fallocate(fd, 0, HEADER_BYTES + identity.image_stripes)
            os.pwrite(fd, _pack(identity, boot_id()), 0)
            self.table = Table(fd, identity)
        except BaseException as error:
            if _is_at(fd, path):
                os.unlink(path)
            os.close(fd)
            if isinstance(error, OSError):
                raise _no_room(path, error) from None
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
                f"the table of UUID {uuid_text(identity.uuid)} is in use by a running device",
                Exit.BUSY,
            ) from None
        except BaseException:
            os.close(fd)
            raise
        return self.table

    def latch_table(self, uuid: bytes, number: int) -> None:
        """Note in the table that an fdatasync of its base failed with errno `number`.

        It is the one that was found, or ours, which all threads look at. Raises OSError.
        """
        if self.table is not None:
            self.table.latch(number)
            return
        fd = os.open(self._path(uuid), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if struct.unpack("<I", os.pread(fd, 4, LATCH_OFFSET)) == (0,):
                os.pwrite(fd, struct.pack("<I", number), LATCH_OFFSET)
        finally:
            os.close(fd)

    def publish_table(self) -> None:
        """Give the new table its name. Raises UbiError (busy) if another took it meanwhile."""
        if self.table is None:
            raise RuntimeError("a table is made before it is published")
        uuid = self.table.identity.uuid
        try:
            os.link(self._temporary(uuid), self._path(uuid))
        except FileExistsError:
            raise UbiError(
                f"another device with UUID {uuid_text(uuid)} went live meanwhile: its base is a "
                "copy",
                Exit.BUSY,
            ) from None
        os.unlink(self._temporary(uuid))

    def unlink_table(self) -> None:
        """Remove the table in use: its base is closed."""
        if self.table is None:
            raise RuntimeError("a table is there until it is unlinked")
        uuid = self.table.identity.uuid
        for path in (self._path(uuid), self._temporary(uuid)):
            if self.table.is_at(path):
                os.unlink(path)

    def _path(self, uuid: bytes) -> str:
        return os.path.join(self._folder, uuid.hex())

    def _temporary(self, uuid: bytes) -> str:
        return self._path(uuid) + ".new"


def look(path: str) -> FoundTable:
    """Read a table file; one of another boot is removed. Its absence is no error; OSError is."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return FoundTable(TableState.NONE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        head = os.pread(fd, HEADER_BYTES, 0)
        identity, boot = _unpack(head)
        if identity is None or os.fstat(fd).st_size != HEADER_BYTES + identity.image_stripes:
            return FoundTable(TableState.DAMAGED)
        if boot != boot_id():
            os.unlink(path)
            return FoundTable(TableState.NONE)
        (latch,) = struct.unpack_from("<I", head, LATCH_OFFSET)
        return FoundTable(TableState.FOUND, identity, latch)
    except BlockingIOError:
        return FoundTable(TableState.LIVE)
    finally:
        os.close(fd)


def _no_room(path: str, error: OSError) -> UbiError:
    """Not the base's fault: it must not be looked for there."""
    return UbiError(
        f"table {path}: a record of the disk's writes cannot be made: {error.strerror}; make room "
        f"there (see `df {os.path.dirname(path)}`)",
    )


def _create(path: str) -> int:
    """Make and lock an empty file. Raises FileExistsError if another one is, or was, at `path`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    # Somebody may look at it just now, or may even have removed it as nobody's.
    fcntl.flock(fd, fcntl.LOCK_EX)
    if not _is_at(fd, path):
        os.close(fd)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    return fd


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove(path: str) -> None:
    """Remove a table that nobody holds. Raises BlockingIOError if somebody does, OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, path):
            os.unlink(path)
    finally:
        os.close(fd)


@functools.cache
def boot_id() -> bytes:
    """Return the id of this boot, 16 bytes (Documentation/admin-guide/sysctl/kernel.rst)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return uuid.UUID(file.read().strip()).bytes


def _pack(identity: Identity, boot: bytes) -> bytes:
    body = _IDENTITY.pack(*identity)
    crc = zlib.crc32(_SEAL.pack(MAGIC, VERSION, 0, boot) + body)
    return _SEAL.pack(MAGIC, VERSION, crc, boot) + body


def _unpack(head: bytes) -> tuple[Identity | None, bytes]:
    """Return identity and boot id; no identity when it is not one of this version, whole."""
    if len(head) < HEADER_BYTES:
        return None, b""
    _, _, _, boot = _SEAL.unpack_from(head)
    identity = Identity(*_IDENTITY.unpack_from(head, _SEAL.size))
    return (identity if head[:_SEALED_BYTES] == _pack(identity, boot) else None), boot


def _lock_memory(address: int, length: int) -> None:
    """mlock(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EPERM, errno.ENOMEM):
            raise OSError(number, f"cannot lock the table in memory: {os.strerror(number)}")
