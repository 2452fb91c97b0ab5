"""The on-disk format, read anew from its description: shares no code with the product.

    0          9   magic "BDEV_UBI\\0", then major and minor version (2 bytes each, little-endian)
    13         1   stripe size in KiB, low 8 bits
    14         2×  headers of 2,097,152 stripes; first byte ≠ 0: the base has the stripe
    5 MiB          the extension's slots, a sector each, 4 KiB apart
    8 MiB          data
"""

from __future__ import annotations

import functools
from typing import NamedTuple

MIB = 1 << 20
DATA_OFFSET = 8 * MIB
HEADERS_OFFSET = 14
MAX_STRIPES = 2_097_152
SLOT_OFFSETS = (5 * MIB, 5 * MIB + 4096)
SLOT_BYTES = 512
MAGIC = b"BDEV_UBI\0"
SLOT_MAGIC = b"UBLKUBIX"
FLAG_OPEN = 1

# Where each field of a slot is: offset and length in bytes.
FIELDS = {
    "magic": (0, 8), "version": (8, 4), "crc32c": (12, 4), "sequence": (16, 8),
    "feature_incompat": (24, 8), "feature_compat": (32, 8), "stripe_bytes": (40, 4),
    "flags": (44, 4), "image_bytes": (48, 8), "fingerprint": (56, 32), "uuid": (88, 16),
    "generation": (104, 8), "boot_id": (112, 16), "block_bytes": (128, 4),
    "zero": (132, 4), "device_bytes": (136, 8), "rest": (144, 368),
}
_RAW = {"magic", "fingerprint", "uuid", "boot_id", "rest"}


class Head(NamedTuple):
    """The first 14 bytes."""

    magic: bytes
    major: int
    minor: int
    stripe_byte: int


class Slot(NamedTuple):
    """A slot's fields as they stand there, and whether its checksum fits."""

    magic: bytes
    version: int
    crc32c: int
    sequence: int
    feature_incompat: int
    feature_compat: int
    stripe_bytes: int
    flags: int
    image_bytes: int
    fingerprint: bytes
    uuid: bytes
    generation: int
    boot_id: bytes
    block_bytes: int
    zero: int
    device_bytes: int
    rest: bytes
    crc_fits: bool

    @property
    def is_open(self) -> bool:
        """Whether a daemon has the disk, or had it when it died."""
        return bool(self.flags & FLAG_OPEN)


@functools.cache
def crc32c(data: bytes) -> int:
    """CRC-32C as a long division of polynomials: generator 0x11EDC6F41, all bits mirrored.

    It begins and ends with an inversion (RFC 3720, appendix B.4).
    """
    generator = 0x11EDC6F41
    mirrored = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    bits = 8 * len(data) + 32
    rest = (int.from_bytes(mirrored, "big") << 32) ^ (0xFFFFFFFF << bits - 32)
    for bit in range(bits - 1, 31, -1):
        if rest >> bit & 1:
            rest ^= generator << bit - 32
    return int(f"{rest:032b}"[::-1], 2) ^ 0xFFFFFFFF


def parse_head(page: bytes) -> Head:
    """Take apart the start of the metadata."""
    return Head(bytes(page[:9]), page[9] | page[10] << 8, page[11] | page[12] << 8, page[13])


def parse_slot(sector: bytes) -> Slot:
    """Take apart a slot, valid or not."""
    assert len(sector) == SLOT_BYTES
    values = {}
    for name, (offset, length) in FIELDS.items():
        raw = bytes(sector[offset : offset + length])
        values[name] = raw if name in _RAW else int.from_bytes(raw, "little")
    fits = values["crc32c"] == crc32c(sector[:12] + bytes(4) + sector[16:])
    return Slot(**values, crc_fits=fits)


def build_slot(**values: int | bytes) -> bytes:
    """Make a slot with a checksum that fits, unless `crc32c` is given; absent fields are zero."""
    sector = bytearray(SLOT_BYTES)
    for name, value in ({"magic": SLOT_MAGIC, "version": 1} | values).items():
        offset, length = FIELDS[name]
        raw = value if isinstance(value, bytes) else value.to_bytes(length, "little")
        assert len(raw) == length
        sector[offset : offset + length] = raw
    if "crc32c" not in values:
        sector[12:16] = crc32c(bytes(sector)).to_bytes(4, "little")
    return bytes(sector)


def build_head(*, major: int = 0, minor: int = 1, stripe_byte: int = 0,
               magic: bytes = MAGIC) -> bytes:
    """Make the first 14 bytes."""
    return magic + major.to_bytes(2, "little") + minor.to_bytes(2, "little") + bytes([stripe_byte])


def header_place(stripe: int) -> tuple[int, int]:
    """Give a stripe's header as (4 KiB page, offset in it)."""
    return divmod(HEADERS_OFFSET + 2 * stripe, 4096)
