r"""Reads the metadata at the start of a base: bdev_ubi 0.1's, and our extension in its padding.

    0          9       magic "BDEV_UBI\0"
    9, 11      2, 2    version, major and minor (LE); minor 2 while a daemon has it open
    13         1       stripe size in KiB, its low 8 bits
    14         2 × n   headers, n = 2,097,152: byte 0 not zero = the base has the stripe
    5 MiB      512     the extension's first slot
    + 4 KiB    512     its second slot
    8 MiB              the disk's data

Only reads, and needs no daemon and no compiled code: what `inspect` says must not depend on the
writer that it checks. `docs/on-disk-format.md` describes every field.
"""

from __future__ import annotations

import struct

import msgspec

from ublk_ubi.options import MAX_STRIPE_SIZE, MAX_STRIPES, METADATA_SIZE, MIN_STRIPE_SIZE

MAGIC = b"BDEV_UBI\0"
HEADERS_OFFSET = 14
SLOT_OFFSETS = (5 << 20, (5 << 20) + 4096)
SLOT_SIZE = 512
SLOT_MAGIC = b"UBLKUBIX"
SLOT_VERSION = 1
KNOWN_INCOMPAT = 0
COUNTER_LIMIT = 1 << 62
FLAG_OPEN = 1
VERSION_CLOSED = (0, 1)
VERSION_OPEN = (0, 2)

_CRC_OFFSET = 12
_SLOT = struct.Struct("<8sIIQQQIIQ32s16sQ16sI4xQ")


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE = _crc_table()


class Extension(msgspec.Struct, frozen=True):
    """One slot of the extension, checked. Sizes are bytes."""

    version: int
    sequence: int
    feature_incompat: int
    feature_compat: int
    stripe_size: int
    is_open: bool
    image_size: int
    fingerprint: bytes
    uuid: bytes
    generation: int
    boot_id: bytes
    block_size: int | None
    disk_size: int | None

    @property
    def image_stripes(self) -> int:
        """How many stripes the image takes, the partial last one included."""
        return -(-self.image_size // self.stripe_size)


class Slot(msgspec.Struct, frozen=True):
    """A slot as found; `extension` if it counts, else `problem` ("" for one that is all zero)."""

    offset: int
    extension: Extension | None
    problem: str

    @property
    def is_zero(self) -> bool:
        """Whether the slot was never written."""
        return self.extension is None and not self.problem


class Metadata(msgspec.Struct, frozen=True):
    """The first 8 MiB of a base, taken apart. `magic` false: not a disk of this format."""

    magic: bool
    major: int
    minor: int
    stripe_size_byte: int
    slots: tuple[Slot, ...]
    blank: bool
    blank_but_slot_0: bool
    headers: bytes

    @property
    def extension(self) -> Extension | None:
        """The slot that counts: the valid one with the higher sequence."""
        valid = [slot.extension for slot in self.slots if slot.extension is not None]
        return max(valid, key=lambda extension: extension.sequence, default=None)

    @property
    def was_cut_short(self) -> bool:
        """Whether a creation ended between its first slot and its magic: nothing was kept here."""
        first = self.slots[0].extension
        return self.blank_but_slot_0 and first is not None and first.sequence == 1

    @property
    def contradicts_itself(self) -> bool:
        """Whether the byte at 13 and the extension differ: another program made a disk over it."""
        extension = self.extension
        return extension is not None and extension.stripe_size >> 10 & 0xFF != self.stripe_size_byte

    @property
    def possible_stripe_sizes(self) -> tuple[int, ...]:
        """The stripe sizes in bytes that the byte at 13 leaves open (it holds 8 bits of KiB)."""
        sizes, size = [], MIN_STRIPE_SIZE
        while size <= MAX_STRIPE_SIZE:
            if size >> 10 & 0xFF == self.stripe_size_byte:
                sizes.append(size)
            size *= 2
        return tuple(sizes)

    def hydrated(self, stripes: int = MAX_STRIPES) -> int:
        """Count the headers, among the first `stripes`, that say the base has the stripe."""
        flags = self.headers[: 2 * stripes : 2]
        return len(flags) - flags.count(0)

    def first_hydrated(self) -> int | None:
        """Give the number of the first stripe that the base has."""
        flags = self.headers[::2]
        rest = flags.lstrip(b"\0")
        return len(flags) - len(rest) if rest else None


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC_TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def parse(data: bytes) -> Metadata:
    """Take apart the first 8 MiB of a base; a shorter one reads as if zeros followed."""
    written = len(data) - data.count(0)  # bytes
    if len(data) < METADATA_SIZE:
        data = data.ljust(METADATA_SIZE, b"\0")
    slot_0 = data[SLOT_OFFSETS[0] : SLOT_OFFSETS[0] + SLOT_SIZE]
    major, minor, stripe_size_byte = struct.unpack_from("<HHB", data, len(MAGIC))
    return Metadata(
        magic=data.startswith(MAGIC),
        major=major,
        minor=minor,
        stripe_size_byte=stripe_size_byte,
        slots=tuple(parse_slot(data[at : at + SLOT_SIZE], at) for at in SLOT_OFFSETS),
        blank=written == 0,
        blank_but_slot_0=written == SLOT_SIZE - slot_0.count(0),
        headers=data[HEADERS_OFFSET : HEADERS_OFFSET + 2 * MAX_STRIPES],
    )


def parse_slot(data: bytes, offset: int = 0) -> Slot:
    """Take apart and check one slot of 512 bytes found at `offset` of the base."""
    assert len(data) == SLOT_SIZE
    if not any(data):
        return Slot(offset, None, "")
    (magic, version, crc, sequence, incompat, compat, stripe_size, flags, image_size,
     fingerprint, uuid, generation, boot_id, block_size, disk_size) = _SLOT.unpack_from(data)
    problem = ""
    if magic != SLOT_MAGIC:
        problem = "damaged: not an extension's magic"
    elif crc32c(data[:_CRC_OFFSET] + bytes(4) + data[_CRC_OFFSET + 4 :]) != crc:
        problem = "damaged: its checksum does not match"
    elif version != SLOT_VERSION:
        problem = f"newer: version {version}, this program knows {SLOT_VERSION}"
    elif incompat & ~KNOWN_INCOMPAT:
        problem = f"newer: unknown features {incompat & ~KNOWN_INCOMPAT:#x}"
    elif max(sequence, generation) >= COUNTER_LIMIT:
        problem = "damaged: an impossible sequence or generation"
    elif not _is_stripe_size(stripe_size):
        problem = f"damaged: a stripe size of {stripe_size} bytes"
    elif image_size > stripe_size * MAX_STRIPES:
        problem = f"damaged: an image of {image_size} bytes has more stripes than headers"
    elif 0 < disk_size < -(-image_size // stripe_size) * stripe_size:
        problem = f"damaged: a disk of {disk_size} bytes is smaller than its image of {image_size}"
    if problem:
        return Slot(offset, None, problem)
    extension = Extension(
        version=version,
        sequence=sequence,
        feature_incompat=incompat,
        feature_compat=compat,
        stripe_size=stripe_size,
        is_open=bool(flags & FLAG_OPEN),
        image_size=image_size,
        fingerprint=fingerprint,
        uuid=uuid,
        generation=generation,
        boot_id=boot_id,
        block_size=block_size or None,
        disk_size=disk_size or None,
    )
    return Slot(offset, extension, "")


def _is_stripe_size(size: int) -> bool:
    return MIN_STRIPE_SIZE <= size <= MAX_STRIPE_SIZE and size & (size - 1) == 0
