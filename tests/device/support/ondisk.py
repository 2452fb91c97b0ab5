"""A reader of the bytes on a base that shares nothing with the product.

Written from the format's description: docs/on-disk-format.md.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from support.direct import DirectFile, read_direct

DATA_OFFSET = 8 << 20
_HEADERS_OFFSET = 14
_SLOTS = (5 << 20, (5 << 20) + 4096)
_SLOT = struct.Struct("<8sIIQQQIIQ32s16sQ16sI4xQ")
_SLOT_MAGIC = b"UBLKUBIX"
_FLAG_OPEN = 1
_CASTAGNOLI = 0x82F63B78


@dataclass(frozen=True)
class Extension:
    """The slot of the extension that counts. Sizes are bytes."""

    sequence: int
    stripe_bytes: int
    image_bytes: int
    fingerprint: bytes
    uuid: bytes
    generation: int
    boot_id: bytes
    is_open: bool
    disk_bytes: int


@dataclass(frozen=True)
class Metadata:
    """The first 8 MiB of a base; `hydrated` are the stripes whose header bit is set."""

    minor: int
    stripe_byte: int
    extension: Extension
    stripes: int
    hydrated: set[int]


def read_metadata(base: str) -> Metadata:
    """Read a base with O_DIRECT, also while a device uses it."""
    head = read_direct(base, 0, 4096)
    assert head[:9] == b"BDEV_UBI\0", f"{base}: magic {head[:9]!r}"
    major, minor, stripe_byte = struct.unpack_from("<HHB", head, 9)
    assert major == 0, f"{base}: major version {major}"
    slots = [_parse_slot(read_direct(base, offset, 512)) for offset in _SLOTS]
    valid = [slot for slot in slots if slot is not None]
    assert valid, f"{base}: no valid slot"
    extension = max(valid, key=lambda slot: slot.sequence)
    assert stripe_byte == (extension.stripe_bytes >> 10) & 0xFF
    stripes = -(-extension.image_bytes // extension.stripe_bytes)
    hydrated = read_bits(base, stripes)
    return Metadata(
        minor=minor, stripe_byte=stripe_byte, extension=extension, stripes=stripes,
        hydrated=hydrated,
    )


def read_bits(base: str, stripes: int) -> set[int]:
    """The stripes, of so many, whose header bit is set on the base now."""
    with DirectFile(base, os.O_RDONLY) as file:
        return bits_of(file, stripes)


def bits_of(base: DirectFile, stripes: int) -> set[int]:
    """The same of a base that is open already."""
    length = -(-(_HEADERS_OFFSET + 2 * stripes) // 4096) * 4096
    first = base.pread(0, length)[_HEADERS_OFFSET : _HEADERS_OFFSET + 2 * stripes : 2]
    return {stripe for stripe, byte in enumerate(first) if byte}


def _parse_slot(data: bytes) -> Extension | None:
    (
        magic, version, crc, sequence, incompat, _compat, stripe_bytes, flags, image_bytes,
        fingerprint, uuid, generation, boot_id, _block_bytes, disk_bytes,
    ) = _SLOT.unpack_from(data)
    if magic != _SLOT_MAGIC or crc != _crc32c(data[:12] + bytes(4) + data[16:]):
        return None
    assert (version, incompat) == (1, 0)
    return Extension(
        sequence=sequence, stripe_bytes=stripe_bytes, image_bytes=image_bytes,
        fingerprint=fingerprint, uuid=uuid, generation=generation, boot_id=boot_id,
        is_open=bool(flags & _FLAG_OPEN), disk_bytes=disk_bytes,
    )


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CASTAGNOLI if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
