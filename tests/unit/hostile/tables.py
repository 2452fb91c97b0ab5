"""The bytes of a table's file, written down from the head of ublk_ubi/table.py."""

from __future__ import annotations

import struct
import zlib

from hypothesis import strategies as st
from unit.hostile.rules import Identity, Table

HEADER = 4096
LATCH = 256
_SEAL = struct.Struct("<8sII16s")
_IDENTITY = struct.Struct("<16s32sQQQQII")
SEALED = _SEAL.size + _IDENTITY.size


def pack(table: Table, boot_id: bytes) -> bytes:
    """A whole file. `damaged` ones get a checksum that does not fit."""
    identity = table.identity or Identity(bytes(16), bytes(32), 0, 0, 0, 0, 0, 0)
    body = _IDENTITY.pack(*identity)
    crc = zlib.crc32(_SEAL.pack(b"UBITABLE", 1, 0, boot_id) + body)
    if table.state == "damaged":
        crc ^= 1
    head = _SEAL.pack(b"UBITABLE", 1, crc, boot_id) + body
    latch = struct.pack("<I", table.latch)
    return (head.ljust(LATCH, b"\0") + latch).ljust(HEADER, b"\0") + table.rows


def unpack(data: bytes, boot_id: bytes) -> Table:
    """What a file's bytes are to an opener of this boot."""
    if len(data) < HEADER:
        return Table("damaged")
    magic, version, crc, boot = _SEAL.unpack_from(data)
    body = data[_SEAL.size : SEALED]
    sealed = zlib.crc32(_SEAL.pack(magic, version, 0, boot) + body)
    identity = Identity(*_IDENTITY.unpack(body))
    if (magic, version, crc) != (b"UBITABLE", 1, sealed):
        return Table("damaged")
    if len(data) != HEADER + identity.image_stripes:
        return Table("damaged")
    if boot != boot_id:
        return Table("none")
    (latch,) = struct.unpack_from("<I", data, LATCH)
    return Table("found", identity, latch, data[HEADER:])


@st.composite
def happenings(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    """What may happen to a file, to be applied by `apply`; "live": somebody holds it."""
    places = st.one_of(
        st.integers(0, SEALED), st.integers(0, SEALED), st.integers(LATCH, LATCH + 3),
        st.integers(0, HEADER + 70000),
    )
    one = st.one_of(
        st.tuples(st.just("write"), places, st.binary(min_size=1, max_size=16)),
        st.tuples(st.sampled_from(["cut", "grow"]), places, st.just(b"")),
        st.tuples(st.sampled_from(["boot", "live"]), st.just(0), st.just(b"")),
    )
    return draw(st.lists(one, max_size=2))


def apply(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """The file after all that."""
    for way, place, new in changes:
        if way == "write" and place < len(data):
            data = data[:place] + new + data[place + len(new) :]
        elif way == "cut":
            data = data[:place]
        elif way == "grow":
            data += bytes(place)
        elif way == "boot" and len(data) > HEADER:
            found = unpack(data, data[16:32])
            data = pack(found, b"e" * 16) if found.identity else data
    return data
