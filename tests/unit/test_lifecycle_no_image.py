"""The lifecycle engine where no image is given, and a failed first fdatasync with any options."""

from __future__ import annotations

import errno
import itertools

import pytest
from enginekit import ubiformat
from enginekit.basedisk import MIB, Disk, FoundTable, Opening, Tables, is_write, open_base
from enginekit.scenes import STRIPES, UUID, bdev_ubi_disk, identity_on, killed, made

from ublk_ubi import _testing as t

KIB = 1 << 10
FULL = range(STRIPES)
# What is told of an image that is not there.
NO_IMAGE = {"no_image": True, "image_bytes": 0, "fingerprint": bytes(32)}


def ended(disk: Disk, tables: Tables, **options) -> str:
    """Be refused, without a write; tell by which name and whether the table was asked for."""
    before = dict(disk.pages)
    opening = Opening(disk, tables, **options)
    trace = opening.run(t.EVENT_START)
    assert opening.steps.phase == t.PHASE_FAILED
    assert disk.pages == before
    assert not any(is_write(what) for what in trace)
    names = {value: name for name, value in vars(t).items() if name.startswith("REFUSE_")}
    return names[opening.steps.refusal].removeprefix("REFUSE_")


# -- what opens without its image -----------------------------------------------------------------


def test_a_base_that_has_all_opens_with_what_it_records() -> None:
    disk, tables = made(*FULL)
    opening = open_base(disk, tables, **NO_IMAGE)
    assert opening.steps.states() == (bytes([t.DURABLE]) * STRIPES, 0)
    slot = disk.current()
    assert (slot.image_bytes, slot.fingerprint) == (3 * MIB + 512, b"f" * 32)
    assert (slot.generation, slot.is_open) == (2, True)
    identity = opening.steps.identity
    assert (identity["image_bytes"], identity["fingerprint"]) == (3 * MIB + 512, b"f" * 32)
    opening.run(t.EVENT_STOP)
    assert opening.steps.phase == t.PHASE_CLOSED
    # With its image it is the same disk.
    assert open_base(disk, tables).steps.identity["generation"] == 3


def test_a_killed_daemon_of_a_full_base_is_gone_on_with() -> None:
    disk, tables = made(*FULL, is_open=True)
    opening = open_base(disk, tables, **NO_IMAGE)
    assert opening.steps.going_on
    assert opening.steps.states() == (bytes([t.DURABLE]) * STRIPES, 0)


@pytest.mark.parametrize("missing", FULL)
def test_one_stripe_that_is_missing_needs_the_image(missing: int) -> None:
    disk, tables = made(*(stripe for stripe in FULL if stripe != missing))
    assert ended(disk, tables, **NO_IMAGE) == "NEEDS_IMAGE"
    assert ended(disk, tables, **NO_IMAGE, force=True, force_stale=True) == "NEEDS_IMAGE"


@pytest.mark.parametrize("missing", FULL)
def test_a_disk_whose_image_is_lost_is_gone_on_with_as_it_is(missing: int) -> None:
    disk, tables = made(*(stripe for stripe in FULL if stripe != missing), is_open=True)
    opening = open_base(disk, tables, **NO_IMAGE, image_lost=True)
    assert opening.steps.going_on
    states = bytearray([t.DURABLE]) * STRIPES
    states[missing] = t.ABSENT
    assert opening.steps.states() == (bytes(states), 0)


def test_the_last_header_of_many_pages_is_looked_at() -> None:
    """10,234 stripes have their headers on six pages, the last one alone on its own."""
    stripes = 10_234
    assert t.header_place(stripes - 1)[1] != t.header_place(stripes - 2)[1]
    values = {"sequence": 2, "stripe_bytes": 64 * KIB, "image_bytes": stripes * 64 * KIB,
              "uuid": UUID, "fingerprint": b"f" * 32, "generation": 1, "boot_id": b"x" * 16}
    disk = Disk()
    disk.put(0, ubiformat.build_head(stripe_byte=0x40))
    disk.put(ubiformat.SLOT_OFFSETS[1], ubiformat.build_slot(**values))
    disk.put(ubiformat.HEADERS_OFFSET, b"\1\0" * (stripes - 1))
    size = 8 * MIB + stripes * 64 * KIB
    assert ended(disk, Tables(), **NO_IMAGE, base_bytes=size) == "NEEDS_IMAGE"
    disk.set_header(stripes - 1)
    assert open_base(disk, Tables(), **NO_IMAGE, base_bytes=size).steps.image_stripes == stripes


def test_what_the_table_alone_knows_is_not_enough() -> None:
    """It may be gone with the next power loss, and then the image would be needed after all."""
    disk, tables = made(0, 1, 2, is_open=True)
    tables.published[UUID].rows[3] = 1
    assert ended(disk, tables, **NO_IMAGE) == "NEEDS_IMAGE"


@pytest.mark.parametrize(("make", "options"), [
    (lambda: (Disk(), Tables()), {}),
    (lambda: made(*FULL), {"format": True}),
    (lambda: (bdev_ubi_disk(0x40), Tables()), {"adopt": True}),
    (lambda: (bdev_ubi_disk(0), Tables()), {"adopt": True, "stripe_bytes": MIB}),
])
def test_nothing_is_made_or_adopted_without_an_image(make, options: dict) -> None:
    assert ended(*make(), **NO_IMAGE, **options) == "NEEDS_IMAGE"


@pytest.mark.parametrize(("change", "refusal"), [
    (lambda disk: disk.put(0, bytes(4096)), "FOREIGN"),
    (lambda disk: disk.put(0, ubiformat.build_head(major=1)), "VERSION"),
    (lambda disk: disk.put(ubiformat.SLOT_OFFSETS[0], b"x" * 512), "DAMAGED"),
])
def test_other_refusals_are_what_they_were(change, refusal: str) -> None:
    disk, tables = made(*FULL)
    disk.put(ubiformat.SLOT_OFFSETS[1], b"x" * 512)
    change(disk)
    assert ended(disk, tables, **NO_IMAGE) == refusal


def test_the_recorded_size_must_fit_the_base_and_the_stripe_size_be_as_asked() -> None:
    disk, tables = made(*FULL)
    assert ended(disk, tables, **NO_IMAGE, base_bytes=12 * MIB - 1) == "TOO_SMALL"
    assert ended(disk, tables, **NO_IMAGE, stripe_bytes=64 * KIB) == "STRIPE_SIZE"


@pytest.mark.parametrize(("size", "refusal"), [
    (0, "DAMAGED"), ((1 << 64) - 1, "TOO_MANY_STRIPES"), ((1 << 64) - MIB + 1, "TOO_MANY_STRIPES"),
    ((1 << 41) + 1, "TOO_MANY_STRIPES"), (1 << 41, "TOO_SMALL"),
])
def test_a_recorded_size_that_no_image_can_have(size: int, refusal: str) -> None:
    """Nothing else is there to compare it with: it may be 0, or not count in 64 bits."""
    disk, tables = made(*FULL)
    slot = {key: value for key, value in disk.current()._asdict().items()
            if key not in ("crc_fits", "crc32c")} | {"sequence": 4, "image_bytes": size}
    disk.put(ubiformat.SLOT_OFFSETS[1], ubiformat.build_slot(**slot))
    assert ended(disk, tables, **NO_IMAGE) == refusal
    opening = Opening(disk, tables)
    opening.run(t.EVENT_START, fail_at=0, error=errno.EIO)
    assert opening.steps.phase == t.PHASE_FAILED


@pytest.mark.parametrize("state", ["live", "stale", "latched", "copy"])
def test_whose_table_it_is_matters_all_the_same(state: str) -> None:
    disk, tables = made(*FULL, is_open=state != "copy")
    if state == "live":
        tables.published[UUID].live = True
    elif state == "stale":
        tables.published.clear()
    elif state == "latched":
        tables.published[UUID].identity["latch"] = errno.EIO
    else:
        tables.published[UUID] = FoundTable(identity_on(disk) | {"inode": 3}, bytearray(STRIPES))
    assert ended(disk, tables, **NO_IMAGE) == state.upper()


# -- a first fdatasync that fails -----------------------------------------------------------------

WRONG = {
    "another size": {"image_bytes": 2 * MIB},
    "another content": {"fingerprint": b"g" * 32},
    "another stripe size": {"stripe_bytes": 64 * KIB},
    "no image": NO_IMAGE,
    "all of it": {"image_bytes": 2 * MIB, "fingerprint": b"g" * 32, "stripe_bytes": 64 * KIB},
}


@pytest.mark.parametrize(("wrong", "force"), list(itertools.product(WRONG, [False, True])))
def test_a_failed_first_fdatasync_is_latched_whatever_was_asked_for(wrong: str, force) -> None:
    """The kernel tells it once: who is refused for something else must not use it up."""
    disk, tables = killed()
    opening = Opening(disk, tables, **WRONG[wrong], force=force, force_stale=force)
    trace = opening.run(t.EVENT_START, fail_at=0, error=errno.ENOLINK)
    assert (opening.steps.refusal, opening.steps.errno_) == (t.REFUSE_IO, errno.ENOLINK)
    assert trace[-1] == "host latch_table"
    assert tables.published[UUID].identity["latch"] == errno.ENOLINK
    assert ended(disk, tables) == "LATCHED"


@pytest.mark.parametrize("wrong", WRONG)
def test_without_that_failure_they_are_refused_for_what_they_are(wrong: str) -> None:
    disk, tables = killed()
    assert ended(disk, tables, **WRONG[wrong]) in (
        "IMAGE_SIZE", "FINGERPRINT", "STRIPE_SIZE", "NEEDS_IMAGE")
    assert open_base(disk, tables).steps.going_on
