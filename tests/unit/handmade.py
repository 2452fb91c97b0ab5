"""Bases put together byte by byte, after docs/on-disk-format.md.

No code in common with what reads them.
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path
from typing import Any

MIB = 1 << 20
SLOT_0, SLOT_1 = 5 * MIB, 5 * MIB + 4096
UUID = uuid.UUID("0011223344556677-8899aabbccddeeff".replace("-", ""))
HERE = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())


def crc(data: bytes) -> int:
    """CRC-32C bit by bit, from its polynomial in normal form, reflected on the way in and out."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= int(f"{byte:08b}"[::-1], 2) << 24
        for _ in range(8):
            value = (value << 1 ^ (0x1EDC6F41 if value >> 31 else 0)) & 0xFFFFFFFF
    return int(f"{value ^ 0xFFFFFFFF:032b}"[::-1], 2)


def slot(**fields: Any) -> bytes:
    """One slot; `crc` given spoils it."""
    values = {
        "magic": b"UBLKUBIX", "version": 1, "sequence": 7, "incompat": 0, "compat": 0,
        "stripe_size": MIB, "flags": 0, "image_size": 10 * MIB + 512,
        "fingerprint": bytes(range(32)), "uuid": UUID.bytes, "generation": 3,
        "boot_id": HERE.bytes, **fields,
    }
    data = bytearray(512)
    data[0:8] = values["magic"]
    struct.pack_into("<I", data, 8, values["version"])
    struct.pack_into("<QQQ", data, 16, values["sequence"], values["incompat"], values["compat"])
    struct.pack_into("<IIQ", data, 40, values["stripe_size"], values["flags"], values["image_size"])
    data[56:88] = values["fingerprint"]
    data[88:104] = values["uuid"]
    struct.pack_into("<Q", data, 104, values["generation"])
    data[112:128] = values["boot_id"]
    struct.pack_into("<I", data, 12, values.get("crc", crc(bytes(data))))
    return bytes(data)


def disk(
    *slots: bytes,
    minor: int = 1,
    major: int = 0,
    stripe_byte: int = 0,
    hydrated: tuple[int, ...] = (),
    magic: bytes = b"BDEV_UBI\0",
) -> bytearray:
    """A base of 8 MiB and a bit."""
    data = bytearray(8 * MIB + 4096)
    data[: len(magic)] = magic
    struct.pack_into("<HHB", data, 9, major, minor, stripe_byte)
    for stripe in hydrated:
        data[14 + 2 * stripe] = 1
    for offset, one in zip((SLOT_0, SLOT_1), slots, strict=False):
        data[offset : offset + 512] = one
    return data
