"""The bytes on the base, as the engine writes them, read by a parser that knows no product code."""

from __future__ import annotations

import random

import pytest
from enginekit import ubiformat
from enginekit.basedisk import MIB, Disk, Tables, open_base
from enginekit.scenes import made

from ublk_ubi import _testing as t
from ublk_ubi import metadata

KIB = 1 << 10
FINGERPRINT = bytes(range(32))
UUID = bytes(range(100, 116))
BOOT_ID = bytes(range(200, 216))
DEVICE_BYTES = 4 * MIB - 4096
OPTIONS = {
    "fingerprint": FINGERPRINT, "new_uuid": UUID, "boot_id": BOOT_ID, "stripe_bytes": 256 * KIB,
    "image_bytes": 3 * MIB + 512, "block_bytes": 4096, "device_bytes": DEVICE_BYTES,
}


def metadata_of(disk: Disk) -> bytes:
    return disk.read(0, 8 * MIB)


# -- checksums ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "crc"), [
    (b"123456789", 0xE3069283),
    (b"", 0),
    (b"a", 0xC1D04330),
    (bytes(32), 0x8A9136AA),           # these four: RFC 3720, appendix B.4
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
])
def test_crc32c_of_known_vectors(data: bytes, crc: int) -> None:
    assert t.crc(data) == crc
    assert ubiformat.crc32c(data) == crc
    assert metadata.crc32c(data) == crc


def test_crc32c_of_random_sectors() -> None:
    source = random.Random(1)
    for length in (1, 2, 3, 4, 5, 511, 512, 513):
        data = source.randbytes(length)
        assert t.crc(data) == ubiformat.crc32c(data) == metadata.crc32c(data)


# -- headers --------------------------------------------------------------------------------------


def test_layout_constants() -> None:
    assert t.DATA_OFFSET == 8 * MIB
    assert ubiformat.SLOT_OFFSETS[0] == t.SLOT_OFFSET
    assert ubiformat.SLOT_OFFSETS[1] == t.SLOT_OFFSET + t.PAGE
    assert t.MAX_STRIPES == 2_097_152
    # The headers end at 4194318, before the slots; those end before the data.
    assert t.header_place(t.MAX_STRIPES - 1)[0] + 2 == 4_194_318
    assert t.header_place(t.MAX_STRIPES - 1)[0] + 2 <= t.SLOT_OFFSET
    assert ubiformat.SLOT_OFFSETS[1] + t.PAGE <= t.DATA_OFFSET
    assert sum(length for _, length in ubiformat.FIELDS.values()) == ubiformat.SLOT_BYTES


@pytest.mark.parametrize(("stripe", "offset", "page"), [
    (0, 14, 0), (1, 16, 0), (248, 510, 0), (249, 512, 0), (2040, 4094, 0), (2041, 4096, 1),
    (4088, 8190, 1), (4089, 8192, 2), (2_097_144, 4_194_302, 1023), (2_097_145, 4_194_304, 1024),
    (2_097_151, 4_194_316, 1024),
])
def test_where_headers_are(stripe: int, offset: int, page: int) -> None:
    assert t.header_place(stripe) == (offset, page)
    assert ubiformat.header_place(stripe) == (page, offset - 4096 * page)


def test_no_header_straddles_a_sector() -> None:
    for stripe in (*range(9000), *range(t.MAX_STRIPES - 3000, t.MAX_STRIPES)):
        offset, page = t.header_place(stripe)
        assert offset // 512 == (offset + 1) // 512
        assert page == offset // 4096


def test_the_first_stripe_of_a_page() -> None:
    assert [t.first_stripe_of_page(page) for page in (0, 1, 2, 1024)] == [0, 2041, 4089, 2_097_145]
    for page in range(1, 1025):
        first = t.first_stripe_of_page(page)
        assert t.header_place(first)[1] == page
        assert t.header_place(first - 1)[1] == page - 1


# -- what the engine writes -----------------------------------------------------------------------


def test_every_field_of_a_new_open_disk() -> None:
    open_base(disk := Disk(), Tables(), **OPTIONS)
    assert disk.head() == ubiformat.Head(b"BDEV_UBI\0", 0, 2, 0)
    first, second = disk.slot(0), disk.slot(1)
    common = {
        "magic": b"UBLKUBIX", "version": 1, "feature_incompat": 0, "feature_compat": 0,
        "stripe_bytes": 256 * KIB, "image_bytes": 3 * MIB + 512, "fingerprint": FINGERPRINT,
        "uuid": UUID, "block_bytes": 4096, "zero": 0, "device_bytes": DEVICE_BYTES,
        "rest": bytes(368), "crc_fits": True,
    }
    assert second._asdict() == common | {
        "crc32c": second.crc32c, "sequence": 2, "flags": 1, "generation": 1, "boot_id": BOOT_ID}
    # As it was made, before anybody had opened it.
    assert first._asdict() == common | {
        "crc32c": first.crc32c, "sequence": 1, "flags": 0, "generation": 0, "boot_id": bytes(16)}
    written = metadata_of(disk)
    for start, end in ((14, 5 * MIB), (5 * MIB + 512, 5 * MIB + 4096),
                       (5 * MIB + 4096 + 512, 8 * MIB)):
        assert written.count(0, start, end) == end - start


def test_closing_changes_the_minor_version_and_a_slot() -> None:
    opening = open_base(disk := Disk(), Tables(), **OPTIONS)
    before = metadata_of(disk)
    opening.run(t.EVENT_STOP)
    after = metadata_of(disk)
    changed = {at // 512 for at in range(0, 8 * MIB, 512) if before[at : at + 512]
               != after[at : at + 512]}
    assert changed == {0, 5 * MIB // 512}
    assert disk.head().minor == 1
    slot = disk.slot(0)
    assert (slot.sequence, slot.generation, slot.is_open) == (3, 1, False)
    assert slot.boot_id == BOOT_ID
    assert after[:11] + after[12:512] == before[:11] + before[12:512]


@pytest.mark.parametrize(("stripe", "byte"), [
    (64 * KIB, 0x40), (128 * KIB, 0x80), (256 * KIB, 0), (512 * KIB, 0), (MIB, 0),
])
def test_the_byte_of_the_stripe_size(stripe: int, byte: int) -> None:
    """bdev_ubi keeps the low 8 bits of KiB; ours is whole in the slot."""
    open_base(disk := Disk(), Tables(), **(OPTIONS | {"stripe_bytes": stripe}))
    assert disk.head().stripe_byte == byte
    assert disk.current().stripe_bytes == stripe


def test_slots_made_by_the_other_parser_are_read_by_the_engine() -> None:
    values = {"sequence": 77, "stripe_bytes": 64 * KIB, "image_bytes": 5 * MIB + 1, "uuid": UUID,
              "fingerprint": FINGERPRINT, "generation": 41, "boot_id": b"x" * 16}
    disk = Disk()
    disk.put(0, ubiformat.build_head(stripe_byte=0x40))
    disk.put(ubiformat.SLOT_OFFSETS[1], ubiformat.build_slot(**values))
    disk.set_header(80)
    opening = open_base(disk, Tables(), fingerprint=FINGERPRINT, image_bytes=5 * MIB + 1,
                        base_bytes=14 * MIB)
    assert opening.uuid == UUID
    assert opening.steps.stripe_bytes == 64 * KIB
    assert opening.steps.image_stripes == 81
    assert opening.steps.states()[0] == bytes([t.ABSENT]) * 80 + bytes([t.DURABLE])
    slot = disk.slot(0)
    assert (slot.sequence, slot.generation, slot.is_open) == (78, 42, True)


@pytest.mark.parametrize(("sector", "condition"), [
    (bytes(512), t.SLOT_ZERO),
    (ubiformat.build_slot(), t.SLOT_VALID),
    (ubiformat.build_slot(flags=0xFFFF_FFFF, feature_compat=(1 << 64) - 1), t.SLOT_VALID),
    (ubiformat.build_slot(rest=b"r" * 368, block_bytes=(1 << 32) - 1), t.SLOT_VALID),
    (ubiformat.build_slot(crc32c=1), t.SLOT_DAMAGED),
    (ubiformat.build_slot(magic=b"UBLKUBIY"), t.SLOT_DAMAGED),
    (ubiformat.build_slot(magic=bytes(8)), t.SLOT_DAMAGED),
    (ubiformat.build_slot(version=2, crc32c=0), t.SLOT_DAMAGED),
    (ubiformat.build_slot(version=2), t.SLOT_NEWER),
    (ubiformat.build_slot(feature_incompat=1 << 40), t.SLOT_NEWER),
    # Numbers that no writer can have reached are the lifecycle's to judge.
    (ubiformat.build_slot(sequence=(1 << 64) - 1, generation=(1 << 64) - 1), t.SLOT_VALID),
    (ubiformat.build_slot(version=2, sequence=(1 << 64) - 1), t.SLOT_NEWER),
])
def test_what_a_slot_is_taken_for(sector: bytes, condition: int) -> None:
    assert t.slot_condition(sector) == condition


def test_any_flipped_bit_of_a_slot_is_noticed() -> None:
    sector = open_base(Disk(), Tables(), **OPTIONS).steps.slot
    assert t.slot_condition(sector) == t.SLOT_VALID
    for bit in range(0, 8 * 512, 7):
        flipped = bytearray(sector)
        flipped[bit // 8] ^= 1 << bit % 8
        assert t.slot_condition(bytes(flipped)) == t.SLOT_DAMAGED


# -- what `inspect` reads -------------------------------------------------------------------------


@pytest.mark.parametrize("is_open", [False, True])
def test_inspect_reads_what_the_engine_wrote(is_open: bool) -> None:
    disk, _ = made(1, 7, is_open=is_open, **OPTIONS)
    found = metadata.parse(metadata_of(disk))
    assert (found.magic, found.major, found.minor) == (True, 0, 2 if is_open else 1)
    assert found.stripe_size_byte == 0
    extension = found.extension
    assert extension is not None
    slot = disk.current()
    assert extension == metadata.Extension(
        version=1, sequence=slot.sequence, feature_incompat=0, feature_compat=0,
        stripe_size=256 * KIB, is_open=is_open, image_size=3 * MIB + 512,
        fingerprint=FINGERPRINT, uuid=UUID, generation=1, boot_id=slot.boot_id,
        block_size=4096, disk_size=DEVICE_BYTES,
    )
    assert extension.image_stripes == 13
    assert found.hydrated() == 2
    assert found.first_hydrated() == 1
    assert [view.offset for view in found.slots] == list(ubiformat.SLOT_OFFSETS)


def test_inspect_and_the_engine_judge_slots_alike() -> None:
    source = random.Random(2)
    good = open_base(Disk(), Tables(), **OPTIONS).steps.slot
    sectors = [bytes(512), good, ubiformat.build_slot(version=2, stripe_bytes=MIB),
               ubiformat.build_slot(feature_incompat=4, stripe_bytes=MIB)]
    for _ in range(100):
        flipped = bytearray(good)
        flipped[source.randrange(512)] ^= 1 << source.randrange(8)
        sectors.append(bytes(flipped))
    for sector in sectors:
        found = metadata.parse_slot(sector)
        said = (t.SLOT_VALID if found.extension else t.SLOT_ZERO if found.is_zero
                else t.SLOT_NEWER if found.problem.startswith("newer") else t.SLOT_DAMAGED)
        assert said == t.slot_condition(sector)
