"""What a refusal may not leave: changes of a disk; and changes that a test makes by hand."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any

from support import ondisk
from support.direct import DirectFile

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOKED_AT = 16 << 20               # bytes from the start
_FIELDS = (
    "magic", "version", "crc", "sequence", "incompat", "compat", "stripe_bytes", "flags",
    "image_bytes", "fingerprint", "uuid", "generation", "boot_id", "block_bytes", "disk_bytes",
)
_SLOT_BYTES = 512


def _state(path: str) -> tuple[object, ...]:
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(LOOKED_AT)).hexdigest()
        if stat.S_ISBLK(os.fstat(file.fileno()).st_mode):
            return (digest,)
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fsync(file.fileno())    # blocks that it has not got yet are no change
        found = os.fstat(file.fileno())
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return digest, found.st_size, found.st_blocks, found.st_mode, found.st_uid, *times


@contextlib.contextmanager
def assert_unchanged(*paths: str) -> Iterator[None]:
    """See that what happens meanwhile changes none of these, a file's times included."""
    before = {path: _state(path) for path in paths}
    yield
    assert {path: _state(path) for path in paths} == before


def slot_fields(data: bytes) -> dict[str, Any]:
    return dict(zip(_FIELDS, ondisk._SLOT.unpack_from(data), strict=True))


def seal_slot(base: str, **changes: object) -> None:
    """Write the slot that counts anew, with changes, as a program of our own making would."""
    with DirectFile(base) as file:
        slots = {offset: file.pread(offset, _SLOT_BYTES) for offset in ondisk._SLOTS}
        offset = max(slots, key=lambda at: slot_fields(slots[at])["sequence"])
        fields = slot_fields(slots[offset]) | changes | {"crc": 0}
        data = ondisk._SLOT.pack(*fields.values()).ljust(_SLOT_BYTES, b"\0")
        crc = ondisk._crc32c(data)
        file.pwrite(data[:12] + crc.to_bytes(4, "little") + data[16:], offset)
