"""The bytes at the start of a base, written down from docs/on-disk-format.md and nothing else."""

from __future__ import annotations

import struct
from typing import NamedTuple

METADATA = 8 << 20
BLOCK = 4096
SECTOR = 512
MAX_STRIPES = 2_097_152
MAGIC = b"BDEV_UBI\0"
HEADERS = 14
SLOTS = (5_242_880, 5_246_976)
SLOT_MAGIC = b"UBLKUBIX"
OPEN = 1

_SLOT = struct.Struct("<8sIIQQQIIQ32s16sQ16sIIQ368s")
# Name: (offset in the slot, bytes).
FIELDS = {
    "magic": (0, 8), "version": (8, 4), "crc": (12, 4), "sequence": (16, 8), "incompat": (24, 8),
    "compat": (32, 8), "stripe": (40, 4), "flags": (44, 4), "image": (48, 8),
    "fingerprint": (56, 32), "uuid": (88, 16), "generation": (104, 8), "boot": (112, 16),
    "block": (128, 4), "zero": (132, 4), "device": (136, 8), "rest": (144, 368),
}


class Slot(NamedTuple):
    """An extension slot's fields in their order. Sizes are bytes."""

    magic: bytes = SLOT_MAGIC
    version: int = 1
    crc: int = 0
    sequence: int = 1
    incompat: int = 0
    compat: int = 0
    stripe: int = 65536
    flags: int = 0
    image: int = 65536
    fingerprint: bytes = bytes(32)
    uuid: bytes = bytes(16)
    generation: int = 0
    boot: bytes = bytes(16)
    block: int = 0
    zero: int = 0
    device: int = 0
    rest: bytes = bytes(368)

    def sealed(self) -> bytes:
        """Its 512 bytes with a checksum that fits."""
        return seal(_SLOT.pack(*self))


def seal(data: bytes) -> bytes:
    """Put the checksum of 512 bytes into them."""
    return data[:12] + struct.pack("<I", slot_crc(data)) + data[16:]


def slot_crc(data: bytes) -> int:
    return crc32c(data[:12] + bytes(4) + data[16:])


def unpack(data: bytes) -> Slot:
    return Slot(*_SLOT.unpack(data))


def head(stripe: int, minor: int) -> bytes:
    """The first 14 bytes of a base."""
    return MAGIC + struct.pack("<HHB", 0, minor, stripe >> 10 & 0xFF)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        remainder = value
        for _ in range(8):
            remainder = remainder >> 1 ^ 0x82F63B78 * (remainder & 1)
        table.append(remainder)
    return table


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


class Disk:
    """The 8 MiB of metadata, of which blocks that are all zero take no room."""

    def __init__(self, blocks: dict[int, bytes] | None = None) -> None:
        self.blocks = dict(blocks or {})

    def copy(self) -> Disk:
        return Disk(self.blocks)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= METADATA
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        there = [number for number in self.blocks if first <= number < end]
        if not there:
            return bytes(length)
        data = bytearray((end - first) * BLOCK)
        for number in there:
            at = (number - first) * BLOCK
            data[at : at + BLOCK] = self.blocks[number]
        start = offset - first * BLOCK
        return bytes(memoryview(data)[start : start + length])

    def write(self, offset: int, data: bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= METADATA
        at = 0
        if offset % BLOCK == len(data) % BLOCK == data.count(0) - len(data) == 0:
            for number in range(offset // BLOCK, (offset + len(data)) // BLOCK):
                self.blocks.pop(number, None)
            return
        while at < len(data):
            number, start = divmod(offset + at, BLOCK)
            piece = data[at : at + BLOCK - start]
            old = self.blocks.get(number, bytes(BLOCK))
            block = old[:start] + piece + old[start + len(piece) :]
            if block.count(0) == BLOCK:
                self.blocks.pop(number, None)
            else:
                self.blocks[number] = block
            at += len(piece)

    def slot(self, index: int) -> bytes:
        return self.read(SLOTS[index], SECTOR)

    def without_head_and_slots(self) -> Disk:
        """All that opening and closing must leave alone."""
        rest = self.copy()
        rest.write(0, bytes(HEADERS))
        for offset in SLOTS:
            rest.write(offset, bytes(BLOCK))
        return rest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Disk) and self.blocks == other.blocks

    __hash__ = None  # type: ignore[assignment]
