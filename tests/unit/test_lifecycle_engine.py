"""The lifecycle engine: exact order of actions, whose table it is, every refusal, every error.

Crashes and power losses are in test_lifecycle_crashes.py.
"""

from __future__ import annotations

import errno
import itertools

import pytest
from enginekit import ubiformat
from enginekit.basedisk import MIB, Disk, FoundTable, Opening, Tables, is_write, open_base
from enginekit.forked import broken_invariant
from enginekit.scenes import (
    ELSEWHERE,
    HERE,
    OPENINGS,
    SCENES,
    STRIPES,
    UUID,
    bdev_ubi_disk,
    identity_on,
    made,
    played,
)

from ublk_ubi import _testing as t

KIB = 1 << 10
REFUSALS = {value: name for name, value in vars(t).items() if name.startswith("REFUSE_")}

FIRST_READS = ["sync", "read 0+4096", "read 5242880+8192"]
SCAN = [f"read {i * MIB}+{MIB}" for i in range(8)]
WIPE = ["zero 5242880+8192", "sync", "host zero_tail",
        *(f"zero {i * MIB}+{MIB}" for i in range(8)), "sync"]
FIRST_WRITES = ["slot 0: sequence 1 generation 0 closed", "sync", "head minor 1", "sync",
                "host created"]
JUDGED = [*FIRST_READS, "read 0+4096", "host find_table", "host before_write"]


def opens(slot: int, sequence: int, generation: int) -> list[str]:
    """Give what publishing a new table looks like."""
    return ["host make_table", "head minor 2",
            f"slot {slot}: sequence {sequence} generation {generation} open", "sync",
            "host publish_table"]


def closes(slot: int, sequence: int, generation: int) -> list[str]:
    return [f"slot {slot}: sequence {sequence} generation {generation} closed", "sync",
            "head minor 1", "sync", "host unlink_table"]


def refused(disk: Disk, tables: Tables | None = None, **options) -> str:
    """Be refused; tell by which name. Nothing is written, nothing is made or dropped."""
    tables = Tables() if tables is None else tables
    before = dict(disk.pages), dict(tables.published), dict(tables.temporary)
    opening = Opening(disk, tables, **options)
    trace = opening.run(t.EVENT_START)
    assert opening.steps.phase == t.PHASE_FAILED
    assert not any(is_write(what) for what in trace)
    assert (disk.pages, tables.published, tables.temporary) == before
    return REFUSALS[opening.steps.refusal].removeprefix("REFUSE_")


# -- the order of actions -------------------------------------------------------------------------


def test_creating_on_zeros() -> None:
    opening = open_base(disk := Disk(), Tables())
    assert opening.trace == [*FIRST_READS, *SCAN, "host before_write", *WIPE, *FIRST_WRITES,
                             *opens(1, 2, 1)]
    assert opening.steps.creating
    assert not opening.steps.going_on
    assert disk.unsynced == []
    assert opening.steps.states() == (bytes(STRIPES), 0)


@pytest.mark.parametrize("at", [0, 600, 4095, MIB, 5 * MIB, 8 * MIB - 1])
def test_formatting_asks_nothing_and_leaves_nothing(at: int) -> None:
    disk = Disk()
    disk.put(at, b"x")
    opening = open_base(disk, Tables(), format=True)
    assert opening.trace == [*FIRST_READS, "host before_write", *WIPE, *FIRST_WRITES,
                             *opens(1, 2, 1)]
    opening.run(t.EVENT_STOP)
    fresh = open_base(Disk(), Tables())
    fresh.run(t.EVENT_STOP)
    assert disk.pages == fresh.disk.pages


def test_opening_anew() -> None:
    disk, tables = made(1, 3)
    opening = open_base(disk, tables)
    assert opening.trace == [*JUDGED, *opens(1, 4, 2)]
    assert opening.steps.states() == (bytes([t.ABSENT, t.DURABLE, t.ABSENT, t.DURABLE]), 0)
    assert opening.rows == bytes([0, 1, 0, 1])
    assert tables.published[UUID].rows is opening.rows


def test_going_on_writes_nothing() -> None:
    disk, tables = made(1, is_open=True)
    tables.published[UUID].rows[2] = 1
    before = dict(disk.pages)
    opening = open_base(disk, tables)
    assert opening.trace == [*JUDGED, "host map_table"]
    assert opening.steps.going_on
    assert disk.pages == before
    assert opening.steps.states() == (bytes([t.ABSENT, t.DURABLE, t.PRESENT, t.ABSENT]), 1)
    assert opening.steps.identity["generation"] == 1
    # Closing ends the generation that was gone on with.
    assert opening.run(t.EVENT_STOP) == closes(0, 3, 1)


def test_closing() -> None:
    opening = open_base(Disk(), Tables())
    assert opening.run(t.EVENT_STOP) == closes(0, 3, 1)
    assert opening.steps.phase == t.PHASE_CLOSED
    assert opening.tables == Tables()
    assert opening.disk.head().minor == 1
    assert not opening.disk.current().is_open


def test_what_is_there_of_a_table_is_dropped_before_the_new_one_is_made() -> None:
    disk, tables = made(1)
    tables.temporary[UUID] = FoundTable(identity_on(disk) | {"generation": 2}, bytearray(STRIPES))
    opening = open_base(disk, tables)
    assert opening.trace == [*JUDGED, "host drop_table", *opens(1, 4, 2)]


def test_a_base_that_says_it_is_open_is_closed_before_its_table_is_dropped() -> None:
    """Else who dies in between leaves a base that looks as if its table were lost."""
    disk, tables = made(1, is_open=True)
    tables.temporary, tables.published = tables.published, {}
    opening = open_base(disk, tables)
    assert opening.trace == [*JUDGED, "slot 0: sequence 3 generation 1 closed", "sync",
                             "host drop_table", *opens(1, 4, 2)]


def test_slots_are_written_in_turn() -> None:
    disk, tables = Disk(), Tables()
    for turn in range(5):
        open_base(disk, tables).run(t.EVENT_STOP)
        slots = [disk.slot(0), disk.slot(1)]
        # Creation wrote the first; each opening and each closing writes one.
        assert sorted(slot.sequence for slot in slots) == [2 * turn + 2, 2 * turn + 3]
        assert disk.current().generation == turn + 1
        assert sorted(slot.is_open for slot in slots) == [False, True]


def test_all_header_pages_of_a_large_image_are_read() -> None:
    stripes = t.MAX_STRIPES
    options = {"image_bytes": stripes * 64 * KIB, "base_bytes": (stripes + 128) * 64 * KIB,
               "stripe_bytes": 64 * KIB}
    disk, tables = made(0, 2040, 2041, stripes - 1, **options)
    opening = open_base(disk, tables, **options)
    reads = [*(f"read {i * MIB}+{MIB}" for i in range(4)), f"read {4 * MIB}+4096"]
    assert opening.trace[3:8] == reads
    states, undurable = opening.steps.states()
    assert undurable == 0
    assert [at for at, state in enumerate(states) if state != t.ABSENT] == [
        0, 2040, 2041, stripes - 1]


def test_headers_that_another_program_wrote_are_kept_as_they_are() -> None:
    """≠ 0 is hydrated, the second byte is not ours, and what is behind the image is let be."""
    disk, tables = made()
    disk.set_header(0, b"\xff\x55")
    disk.set_header(1, b"\0\x66")
    disk.set_header(STRIPES, b"\1\x77")
    opening = open_base(disk, tables)
    assert opening.steps.states()[0] == bytes([t.DURABLE, t.ABSENT, t.ABSENT, t.ABSENT])
    opening.run(t.EVENT_STOP)
    assert [disk.header(stripe) for stripe in (0, 1, STRIPES)] == [
        b"\xff\x55", b"\0\x66", b"\1\x77"]


# -- whose table it is ----------------------------------------------------------------------------


def table(disk: Disk, kind: str) -> FoundTable | None:
    """Give a table of a kind, for a disk as it is."""
    if kind == "none":
        return None
    identity = identity_on(disk)
    changed = {
        "other generation": {"generation": identity["generation"] + 1},
        "older generation": {"generation": identity["generation"] - 1},
        "other device": {"device": 9},
        "other inode": {"inode": 9},
        "other fingerprint": {"fingerprint": b"F" * 32},
        "other image size": {"image_bytes": 3 * MIB},
        "other stripe size": {"stripe_bytes": 512 * KIB},
        "other stripes": {"image_stripes": STRIPES + 1},
        "latched": {"latch": errno.EIO},
    }
    return FoundTable(identity | changed.get(kind, {}), bytearray(STRIPES), live=kind == "live",
                      damaged=kind == "damaged")


FOREIGN_TABLES = ["other generation", "older generation", "other device", "other inode",
                  "other fingerprint", "other image size", "other stripe size", "other stripes",
                  "damaged"]
SLOTS = ["closed", "open here", "open elsewhere"]
PUBLISHED = ["none", "valid", "latched", "live", *FOREIGN_TABLES]
TEMPORARY = ["none", "valid", "live", "other generation", "other inode", "damaged"]
ELSEWHERE_TABLES = ("other device", "other inode")
OTHER_UUID = b"n" * 16
NEW, DROP, GO_ON = "new", "drop it, new", "go on"


def who_opens(slot: str, published: str, temporary: str) -> str:
    """Give what the list in _lifecycle.pxd says."""
    there = (published, temporary) != ("none", "none")
    if "live" in (published, temporary):
        return "LIVE"
    if slot == "open here":
        if published in ("valid", "latched"):
            return GO_ON if published == "valid" else "LATCHED"
        return DROP if (published, temporary) == ("none", "valid") else "STALE"
    ours = ("none", "valid", "latched") if slot == "closed" else ("none",)
    if published not in ours:
        return "COPY"
    return DROP if there else NEW


def test_the_list_has_each_of_its_rows() -> None:
    outcomes = {who_opens(*row) for row in itertools.product(SLOTS, PUBLISHED, TEMPORARY)}
    assert outcomes == {NEW, DROP, GO_ON, "LIVE", "LATCHED", "STALE", "COPY"}


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("published", PUBLISHED)
def test_who_opens_what_is_found(slot: str, published: str) -> None:
    original, _ = made(1, is_open=slot != "closed",
                       boot_id=ELSEWHERE if slot == "open elsewhere" else HERE)
    for temporary, force_stale in itertools.product(TEMPORARY, (False, True)):
        disk, tables = original.copy(), Tables()
        if (found := table(disk, published)) is not None:
            found.rows[:2] = b"\1\1"
            tables.published[UUID] = found
        found_there = found
        if (found := table(disk, temporary)) is not None:
            tables.temporary[UUID] = found
        there = bool(tables.published or tables.temporary)
        outcome = who_opens(slot, published, temporary)
        row = f"{slot}, {published}, {temporary}, force {force_stale}"
        if outcome in ("COPY", "STALE", "LATCHED") and force_stale:
            outcome = DROP if there else NEW
        if outcome not in (NEW, DROP, GO_ON):
            assert refused(disk, tables, force_stale=force_stale) == outcome, row
            continue
        # A table of a base in another place may be a copy's original's: it stays.
        copied = outcome == DROP and force_stale and published in ELSEWHERE_TABLES
        opening = open_base(disk, tables, force_stale=force_stale, new_uuid=OTHER_UUID)
        assert opening.steps.going_on == (outcome == GO_ON), row
        assert ("host drop_table" in opening.trace) == (outcome == DROP and not copied), row
        assert disk.current().generation == (1 if outcome == GO_ON else 2), row
        assert opening.steps.states()[1] == (1 if outcome == GO_ON else 0), row
        assert disk.current().uuid == (OTHER_UUID if copied else UUID), row
        assert opening.rows is tables.published[disk.current().uuid].rows, row
        assert (tables.published.get(UUID) is found_there) == (copied or outcome == GO_ON), row


def test_a_table_found_with_fewer_stripes_than_the_base_has_is_foreign_writing() -> None:
    """Somebody wrote to the base while its daemon was down."""
    disk, tables = made(1, is_open=True)
    disk.set_header(3)
    assert refused(disk, tables) == "FOREIGN_WRITER"
    opening = open_base(disk, tables, force_stale=True)
    assert opening.trace == [*JUDGED, "host map_table", "slot 0: sequence 3 generation 1 closed",
                             "sync", "host drop_table", *opens(1, 4, 2)]
    # Not the old generation: who undoes this opening must know that the table is his.
    assert not opening.steps.going_on
    assert opening.steps.states() == (bytes([0, t.DURABLE, 0, t.DURABLE]), 0)
    assert tables.published[UUID].identity["generation"] == 2


def test_force_stale_forgets_what_the_table_alone_knew() -> None:
    disk, tables = made(1, is_open=True)
    tables.published[UUID].rows[2] = 1
    tables.published[UUID].identity["latch"] = errno.EIO
    assert refused(disk, tables) == "LATCHED"
    opening = open_base(disk, tables, force_stale=True)
    assert opening.steps.states() == (bytes([0, t.DURABLE, 0, 0]), 0)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 8, 9, 511, 512, 1080, 4096, MIB - 1, MIB, 4_194_318, 5 * MIB,
                                5 * MIB + 4096, 8 * MIB - 1])
def test_one_byte_anywhere_makes_a_base_foreign(at: int) -> None:
    disk = Disk()
    disk.put(at, b"x")
    assert refused(disk) == "FOREIGN"


def test_a_disk_of_ours_that_lost_its_magic_is_foreign() -> None:
    for gone in (b"\0", b"BDEV_UBJ\0", b"BDEV_UBI\1"):
        disk, tables = made(1)
        disk.put(0, gone)
        assert refused(disk, tables) == "FOREIGN"
    disk, tables = made(1)
    disk.put(0, bytes(4096))
    assert refused(disk, tables) == "FOREIGN"


def test_only_zeros_around_its_first_slot_make_a_creation_that_was_cut_short() -> None:
    cut = Opening(Disk(), Tables())
    cut.run(t.EVENT_START, stop_at=len([*FIRST_READS, *SCAN, "host before_write", *WIPE]) + 1)
    assert cut.trace[-1] == FIRST_WRITES[0]
    assert open_base(cut.disk.copy(), Tables()).steps.creating
    for at in (0, 4096, 5 * MIB + 512, 5 * MIB + 4096, 8 * MIB - 1):
        disk = cut.disk.copy()
        disk.put(at, b"x")
        assert refused(disk) == "FOREIGN"
    # A later slot belongs to a disk that was in use.
    disk = Disk()
    slot = cut.disk.slot(0)._asdict() | {"sequence": 2}
    del slot["crc_fits"], slot["crc32c"]
    disk.put(ubiformat.SLOT_OFFSETS[0], ubiformat.build_slot(**slot))
    assert refused(disk) == "FOREIGN"


def test_a_head_that_does_not_fit_the_slot_is_another_programs() -> None:
    """It made a disk of its own here, and did not touch the padding."""
    disk, tables = made(1)
    disk.put(0, ubiformat.build_head(stripe_byte=0x40))
    assert refused(disk, tables) == "DAMAGED"
    assert refused(disk, tables, adopt=True, force=True, force_stale=True) == "DAMAGED"


@pytest.mark.parametrize("name", ["sequence", "generation"])
def test_a_number_near_its_end_is_damage_of_the_slot_that_counts(name: str) -> None:
    """2^62: nobody has opened a disk so often, and what begins again at 0 would count for nothing.

    The slot is not passed over: what is in the other one is older.
    """
    disk, tables = made(1)
    slot = {key: value for key, value in disk.current()._asdict().items()
            if key not in ("crc_fits", "crc32c")} | {"sequence": 4}
    for number in (1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        disk.put(ubiformat.SLOT_OFFSETS[1], ubiformat.build_slot(**(slot | {name: number})))
        for options in ({}, {"adopt": True, "force": True, "force_stale": True}):
            assert refused(disk, tables, **options) == "DAMAGED"
    # A slot that does not count may say what it will.
    if name == "generation":
        disk.put(ubiformat.SLOT_OFFSETS[1],
                 ubiformat.build_slot(**(slot | {name: 1 << 62, "sequence": 1})))
        assert open_base(disk.copy(), tables.copy()).steps.identity["generation"] == 2
    # What is newer is told first: it may count otherwise.
    disk.put(ubiformat.SLOT_OFFSETS[1], ubiformat.build_slot(**(slot | {name: 1 << 62,
                                                                        "version": 2})))
    assert refused(disk, tables) == "NEWER"
    # The last number that is none of these goes on, once.
    disk.put(ubiformat.SLOT_OFFSETS[1], ubiformat.build_slot(**(slot | {name: (1 << 62) - 1})))
    opening = open_base(disk, tables)
    assert getattr(disk.current(), name) == 1 << 62
    opening.run(t.EVENT_STOP)
    assert refused(disk, tables) == "DAMAGED"


@pytest.mark.parametrize(("major", "minor"), [(1, 1), (1, 2), (0, 0), (0, 3), (0, 256), (256, 1),
                                              (0xFFFF, 0xFFFF)])
def test_unknown_versions(major: int, minor: int) -> None:
    disk, tables = made()
    disk.put(0, ubiformat.build_head(major=major, minor=minor))
    assert refused(disk, tables) == "VERSION"


BAD_SLOTS = {
    "magic": lambda slot: b"UBLKUBIY" + slot[8:],
    "one bit": lambda slot: slot[:100] + bytes([slot[100] ^ 4]) + slot[101:],
    "one bit of the rest": lambda slot: slot[:511] + b"\1",
    "checksum": lambda slot: slot[:12] + bytes([slot[12] ^ 1]) + slot[13:],
    "zeros with a byte": lambda _slot: bytes(511) + b"\1",
    "noise": lambda _slot: b"\xa5" * 512,
}


@pytest.mark.parametrize("bad", BAD_SLOTS)
def test_a_damaged_slot_leaves_the_other_and_two_are_refused(bad: str) -> None:
    for index in (0, 1):
        disk, tables = made(1)  # slot 1: sequence 2, open; slot 0: sequence 3, closed
        sector = disk.read(ubiformat.SLOT_OFFSETS[index], 4096)[:512]
        disk.put(ubiformat.SLOT_OFFSETS[index], BAD_SLOTS[bad](sector))
        tables.published.clear()
        opening = open_base(disk, tables, force_stale=index == 0)
        # The next one is written over the bad one.
        sequence = 3 if index == 0 else 4
        assert opening.trace[-3].startswith(f"slot {index}: sequence {sequence} generation 2 open")
        assert opening.steps.states()[0][1] == t.DURABLE
    disk, tables = made(1)
    for offset in ubiformat.SLOT_OFFSETS:
        disk.put(offset, BAD_SLOTS[bad](disk.read(offset, 4096)[:512]))
    assert refused(disk, tables) == "DAMAGED"
    assert refused(disk, tables, adopt=True) == "DAMAGED"


@pytest.mark.parametrize("other", [bytes(512), b"\xa5" * 512], ids=["zero", "noise"])
def test_one_damaged_slot_and_none_is_refused(other: bytes) -> None:
    for order in (0, 1):
        disk, tables = made()
        disk.put(ubiformat.SLOT_OFFSETS[order], other)
        disk.put(ubiformat.SLOT_OFFSETS[1 - order], b"\x5a" * 512)
        assert refused(disk, tables, adopt=True) == "DAMAGED"


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("newer", [
    {"version": 2}, {"version": 0}, {"feature_incompat": 1}, {"feature_incompat": 1 << 63},
])
def test_newer_slots_are_refused_whatever_the_other_says(index: int, newer: dict) -> None:
    disk, tables = made()
    slot = disk.slot(index)._asdict()
    del slot["crc_fits"], slot["crc32c"]
    disk.put(ubiformat.SLOT_OFFSETS[index], ubiformat.build_slot(**(slot | newer)))
    assert refused(disk, tables) == "NEWER"
    assert refused(disk, tables, force=True, force_stale=True, adopt=True) == "NEWER"


def test_unknown_compatible_features_are_no_obstacle() -> None:
    disk, tables = made(1)
    for offset in ubiformat.SLOT_OFFSETS:
        slot = ubiformat.parse_slot(disk.read(offset, 4096)[:512])._asdict()
        del slot["crc_fits"], slot["crc32c"]
        disk.put(offset, ubiformat.build_slot(**(slot | {"feature_compat": 1 << 5})))
    open_base(disk, tables)
    assert disk.current().feature_compat == 1 << 5


@pytest.mark.parametrize(("options", "refusal"), [
    ({"stripe_bytes": 512 * KIB}, "STRIPE_SIZE"),
    ({"image_bytes": 3 * MIB}, "IMAGE_SIZE"),
    ({"image_bytes": 3 * MIB, "force": True, "force_stale": True, "adopt": True}, "IMAGE_SIZE"),
    ({"fingerprint": b"F" * 32}, "FINGERPRINT"),
    ({"base_bytes": 12 * MIB - 1}, "TOO_SMALL"),
])
def test_a_disk_of_ours_with_other_options(options: dict, refusal: str) -> None:
    disk, tables = made(1)
    assert refused(disk, tables, **options) == refusal


def test_another_image_of_the_same_size_by_force() -> None:
    disk, tables = made(1)
    other = b"F" * 32
    opening = open_base(disk, tables, fingerprint=other, force=True)
    assert opening.steps.identity["fingerprint"] == other
    opening.run(t.EVENT_STOP)
    assert disk.current().fingerprint == other
    assert open_base(disk, tables, fingerprint=other).steps.states()[0][1] == t.DURABLE


@pytest.mark.parametrize(("options", "refusal"), [
    ({"stripe_bytes": 32 * KIB}, "STRIPE_RANGE"),
    ({"stripe_bytes": 2 * MIB}, "STRIPE_RANGE"),
    ({"stripe_bytes": 96 * KIB}, "STRIPE_RANGE"),
    ({"stripe_bytes": 64 * KIB + 1}, "STRIPE_RANGE"),
    ({"stripe_bytes": 1}, "STRIPE_RANGE"),
    ({"default_stripe_bytes": 4096}, "STRIPE_RANGE"),
    ({"stripe_bytes": 64 * KIB, "image_bytes": (t.MAX_STRIPES << 16) + 1, "base_bytes": 1 << 50},
     "TOO_MANY_STRIPES"),
    ({"image_bytes": (t.MAX_STRIPES << 20) + 1, "base_bytes": 1 << 62}, "TOO_MANY_STRIPES"),
    ({"base_bytes": 12 * MIB - 1}, "TOO_SMALL"),
    ({"base_bytes": 8 * MIB + 3 * MIB + 512}, "TOO_SMALL"),
    ({"base_bytes": 8 * MIB}, "TOO_SMALL"),
])
@pytest.mark.parametrize("formatting", [False, True])
def test_a_new_base_that_cannot_be(options: dict, refusal: str, formatting: bool) -> None:
    assert refused(Disk(), format=formatting, **options) == refusal


@pytest.mark.parametrize(("stripe", "image", "stripes"), [
    (64 * KIB, 1, 1), (64 * KIB, 64 * KIB, 1), (64 * KIB, 64 * KIB + 1, 2),
    (MIB, t.MAX_STRIPES * MIB, t.MAX_STRIPES), (512 * KIB, 512 * KIB * 2041, 2041),
])
def test_the_smallest_base_that_an_image_fits(stripe: int, image: int, stripes: int) -> None:
    needed = 8 * MIB + stripes * stripe
    opening = open_base(Disk(), Tables(), stripe_bytes=stripe, image_bytes=image,
                        base_bytes=needed)
    assert opening.steps.image_stripes == stripes
    assert opening.steps.page_count == (14 + 2 * (stripes - 1)) // 4096 + 1
    assert refused(Disk(), stripe_bytes=stripe, image_bytes=image,
                   base_bytes=needed - 1) == "TOO_SMALL"


def test_a_disks_block_size_is_what_it_was_made_with() -> None:
    """Image and base may move to other disks; what a guest has formatted stays as it is."""
    disk, tables = Disk(), Tables()
    for asked in (4096, 512, 0):
        opening = open_base(disk, tables, block_bytes=asked)
        assert disk.current().block_bytes == 4096
        opening.run(t.EVENT_STOP)
        assert disk.current().block_bytes == 4096
    # One that has none recorded, as before there was such a field, gets it with its next opening.
    disk, tables = made(1)
    assert disk.current().block_bytes == 0
    open_base(disk, tables, block_bytes=512)
    assert disk.current().block_bytes == 512


def test_the_recorded_stripe_size_governs_without_being_asked_for() -> None:
    disk, tables = made(3, stripe_bytes=512 * KIB)
    opening = open_base(disk, tables)
    assert opening.steps.stripe_bytes == 512 * KIB
    assert opening.steps.image_stripes == 7
    opening.run(t.EVENT_STOP)
    assert open_base(disk, tables, stripe_bytes=512 * KIB).steps.states()[0][3] == t.DURABLE


# -- disks of bdev_ubi's --------------------------------------------------------------------------


@pytest.mark.parametrize(("byte", "asked", "stripe"), [
    (0x40, 0, 64 * KIB), (0x40, 64 * KIB, 64 * KIB), (0x80, 0, 128 * KIB),
    (0x80, 128 * KIB, 128 * KIB), (0, 256 * KIB, 256 * KIB), (0, 512 * KIB, 512 * KIB),
    (0, MIB, MIB),
])
@pytest.mark.parametrize("minor", [1, 2])
def test_adoption(byte: int, asked: int, stripe: int, minor: int) -> None:
    """Minor 2 without a slot: an adoption that was cut short."""
    disk = bdev_ubi_disk(byte, minor)
    opening = open_base(disk, Tables(), adopt=True, stripe_bytes=asked)
    assert opening.trace == [*JUDGED, *opens(0, 1, 1)]
    assert opening.steps.adopting
    assert opening.steps.stripe_bytes == stripe
    states, undurable = opening.steps.states()
    assert undurable == 0
    assert [at for at, state in enumerate(states) if state == t.DURABLE] == [0, 2]
    assert [disk.header(at) for at in (0, 1, 2)] == [b"\1\0", b"\0\0", b"\1\x99"]
    opening.run(t.EVENT_STOP)
    # From now on it is a disk of ours, and bdev_ubi still reads it.
    assert disk.head() == ubiformat.Head(ubiformat.MAGIC, 0, 1, stripe >> 10 & 0xFF)
    assert open_base(disk, Tables()).steps.states()[0] == states


@pytest.mark.parametrize(("byte", "options", "refusal"), [
    (0x40, {}, "ADOPT"),
    (0x40, {"force": True, "force_stale": True, "stripe_bytes": 64 * KIB}, "ADOPT"),
    (0, {"adopt": True}, "STRIPE_UNKNOWN"),
    (0x40, {"adopt": True, "stripe_bytes": 128 * KIB}, "STRIPE_SIZE"),
    (0x40, {"adopt": True, "stripe_bytes": MIB}, "STRIPE_SIZE"),
    (0, {"adopt": True, "stripe_bytes": 64 * KIB}, "STRIPE_SIZE"),
    (0x20, {"adopt": True}, "STRIPE_RANGE"),
    (0x41, {"adopt": True}, "STRIPE_RANGE"),
    (0xFF, {"adopt": True}, "STRIPE_RANGE"),
    (0, {"adopt": True, "stripe_bytes": 2 * MIB}, "STRIPE_RANGE"),
    (0, {"adopt": True, "stripe_bytes": MIB, "base_bytes": 12 * MIB - 1}, "TOO_SMALL"),
    (0x40, {"adopt": True, "image_bytes": (t.MAX_STRIPES << 16) + 1, "base_bytes": 1 << 50},
     "TOO_MANY_STRIPES"),
])
def test_disks_of_bdev_ubis_that_are_not_adopted(byte: int, options: dict, refusal: str) -> None:
    assert refused(bdev_ubi_disk(byte), **options) == refusal


def test_adopting_what_is_ours_is_opening_it() -> None:
    disk, tables = made(1)
    opening = open_base(disk, tables, adopt=True)
    assert not opening.steps.adopting
    assert disk.current().generation == 2


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OPENINGS, "closing"])
def test_an_error_of_any_action_ends_it_there(name: str) -> None:
    whole = played(SCENES[name])
    assert whole.steps.phase in (t.PHASE_OPEN, t.PHASE_CLOSED)
    # A first fdatasync that fails has a test of its own.
    for at in range(1 if whole.trace[0] == "sync" else 0, len(whole.trace)):
        opening = played(SCENES[name], fail_at=at, error=errno.ENOLINK)
        assert opening.trace == whole.trace[: at + 1]
        assert opening.steps.phase == t.PHASE_FAILED
        assert opening.steps.refusal == t.REFUSE_IO
        assert opening.steps.errno_ == errno.ENOLINK


@pytest.mark.parametrize("name", OPENINGS)
def test_a_first_fdatasync_that_fails_changes_nothing_but_a_latch(name: str) -> None:
    """What a killed daemon wrote may be lost, and only its table knows what that was."""
    opening = played(SCENES[name], fail_at=0, error=errno.ENOLINK)
    assert opening.steps.phase == t.PHASE_FAILED
    assert opening.steps.refusal == t.REFUSE_IO
    assert opening.steps.errno_ == errno.ENOLINK
    assert not any(is_write(what) for what in opening.trace)
    calls = [what for what in opening.trace if what.startswith("host")]
    if name not in ("going on", "forcing"):
        assert calls in ([], ["host find_table"])
        return
    assert calls == ["host find_table", "host latch_table"]
    again = Opening(opening.disk, opening.tables)
    again.run(t.EVENT_START)
    assert again.steps.refusal == t.REFUSE_LATCHED


def test_a_first_fdatasync_that_fails_hides_no_other_refusal() -> None:
    for name, disk in (("FOREIGN", Disk()), ("ADOPT", bdev_ubi_disk(0x40))):
        if name == "FOREIGN":
            disk.put(MIB, b"x")
        opening = Opening(disk, Tables())
        opening.run(t.EVENT_START, fail_at=0, error=errno.EIO)
        assert REFUSALS[opening.steps.refusal] == f"REFUSE_{name}"


@pytest.mark.parametrize("name", OPENINGS)
def test_nothing_is_written_before_all_is_judged(name: str) -> None:
    trace = played(SCENES[name]).trace
    judged = trace.index("host before_write")
    assert not any(is_write(what) for what in trace[:judged])
    assert not {"host drop_table", "host make_table", "host zero_tail"} & set(trace[:judged])
    assert trace[0] == "sync"  # before anything is believed


@pytest.mark.parametrize("name", SCENES)
def test_tables_change_only_around_what_the_base_says(name: str) -> None:
    """Published after the base durably names its generation, unlinked after it is closed."""
    trace = played(SCENES[name]).trace
    for call, word in (("host publish_table", "open"), ("host unlink_table", "closed")):
        if call in trace:
            before = trace[: trace.index(call)]
            assert before[-1] == "sync"
            assert any(what.startswith("slot") and what.endswith(word) for what in before)


STEPS = {
    "START": lambda o: o.steps.step(t.EVENT_START),
    "STOP": lambda o: o.steps.step(t.EVENT_STOP),
    "GROW": lambda o: o.steps.step(t.EVENT_GROW),
    "done": lambda o: o.steps.step(t.EVENT_DONE),
    "failed": lambda o: o.steps.step(t.EVENT_DONE, -5),
    "tick": lambda o: o.steps.step(t.EVENT_TICK),
}
ONCE = "an action ends only while it runs"
OPENED_ONCE, CLOSED_ONCE = "a base is opened once", "only an open base is closed"
SHUT = {"STOP": CLOSED_ONCE, "GROW": "only an open base grows"}


@pytest.mark.parametrize(("state", "invariants"), [
    ("new", {**SHUT, "done": ONCE, "failed": ONCE}),
    ("reading", {"START": OPENED_ONCE, **SHUT}),
    ("open", {"START": OPENED_ONCE, "done": ONCE, "failed": ONCE}),
    ("closed", {"START": OPENED_ONCE, **SHUT, "done": ONCE, "failed": ONCE}),
    ("refused", {"START": OPENED_ONCE, **SHUT, "done": ONCE, "failed": ONCE}),
])
def test_what_must_not_happen_ends_the_process(state: str, invariants: dict) -> None:
    disk, tables = made()
    opening = Opening(disk, tables, **({"format": True, "base_bytes": 1} if state == "refused"
                                       else {}))
    if state != "new":
        opening.run(t.EVENT_START, stop_at=1 if state == "reading" else None)
    if state == "closed":
        opening.run(t.EVENT_STOP)
    said = {name: broken_invariant(lambda name=name: STEPS[name](opening)) for name in STEPS}
    tick = "a lifecycle knows START, STOP, GROW and completions"
    assert said == dict.fromkeys(STEPS) | invariants | {"tick": tick}


def test_states_are_told_of_an_open_base_only() -> None:
    opening = Opening(Disk(), Tables())
    assert broken_invariant(opening.steps.states) == "states are known once the base is open"
    opening = Opening(Disk(), Tables(), image_bytes=0)
    assert broken_invariant(lambda: opening.run(t.EVENT_START)) == "an image is not empty"
