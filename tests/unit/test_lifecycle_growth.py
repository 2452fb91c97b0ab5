"""The lifecycle engine where a disk grows: which size its base says it has, whatever happens."""

from __future__ import annotations

import errno

import pytest
from enginekit import ubiformat
from enginekit.basedisk import MIB, PAGE, Disk, Opening, Tables, open_base
from enginekit.scenes import ELSEWHERE, UUID, bdev_ubi_disk, made

from ublk_ubi import _testing as t

OLD, NEW = 4 * MIB, 64 * MIB
TAIL = ubiformat.DATA_OFFSET + OLD
GROWS = ["sync", "slot 0: sequence 3 generation 1 open", "sync"]


def opened() -> Opening:
    return open_base(Disk(), Tables(), device_bytes=OLD)


def size_of(disk: Disk) -> int:
    return disk.current().device_bytes


def test_a_size_is_recorded_from_the_first() -> None:
    opening = opened()
    assert [opening.disk.slot(index).device_bytes for index in (0, 1)] == [OLD, OLD]


def test_a_disk_that_records_none_does_from_its_next_opening() -> None:
    """Those of before this field; a daemon that goes on with one writes no slot."""
    disk, tables = made(1)
    assert size_of(disk) == 0
    open_base(disk, tables, device_bytes=OLD)
    assert size_of(disk) == OLD
    disk, tables = made(1, is_open=True)
    open_base(disk, tables, device_bytes=OLD)
    assert size_of(disk) == 0


def test_an_adopted_disk_records_what_it_is() -> None:
    disk = bdev_ubi_disk(0)
    open_base(disk, Tables(), adopt=True, stripe_bytes=MIB, device_bytes=OLD)
    assert size_of(disk) == OLD


def test_growing() -> None:
    opening = opened()
    assert opening.run(t.EVENT_GROW, offset=NEW) == GROWS
    assert opening.steps.phase == t.PHASE_OPEN
    assert (size_of(opening.disk), opening.steps.errno_) == (NEW, 0)
    opening.run(t.EVENT_GROW, offset=2 * NEW)
    opening.run(t.EVENT_STOP)
    assert opening.steps.phase == t.PHASE_CLOSED
    assert size_of(opening.disk) == 2 * NEW
    assert opening.tables == Tables()


def test_a_new_part_reads_as_it_shall_before_the_base_says_that_it_is_the_disks() -> None:
    """Power is lost at any action: with the new size there are zeros, not what was there once."""
    found = set()
    for at in range(len(GROWS) + 1):
        opening = opened()
        opening.disk.write(TAIL, b"o" * PAGE)
        opening.disk.sync()
        opening.disk.write(TAIL, bytes(PAGE))
        opening.run(t.EVENT_GROW, offset=NEW, stop_at=at)
        unsynced = opening.disk.unsynced
        for kept in ([], unsynced, *([write] for write in unsynced)):
            disk = opening.disk.after_power_loss(kept)
            again = open_base(disk.copy(), Tables(), boot_id=ELSEWHERE)
            assert again.steps.phase == t.PHASE_OPEN
            old_data = disk.pages.get(TAIL // PAGE) is not None
            assert not (size_of(disk) == NEW and old_data), at
            found.add((size_of(disk), old_data))
    assert found == {(OLD, True), (OLD, False), (NEW, False)}


@pytest.mark.parametrize("at", range(3))
def test_an_error_leaves_a_disk_of_the_size_before(at: int) -> None:
    """A failed fdatasync is final; a write that failed may be tried again."""
    opening = opened()
    trace = opening.run(t.EVENT_GROW, offset=NEW, fail_at=at, error=errno.ENOSPC)
    assert trace == GROWS[: at + 1] + (["host latch_table"] if at != 1 else [])
    assert (opening.steps.phase, opening.steps.errno_) == (t.PHASE_OPEN, errno.ENOSPC)
    assert opening.tables.published[UUID].identity["latch"] == (errno.ENOSPC if at != 1 else 0)
    if at == 1:
        assert opening.run(t.EVENT_GROW, offset=NEW) == GROWS
        assert (size_of(opening.disk), opening.steps.errno_) == (NEW, 0)
    else:
        opening.run(t.EVENT_STOP)
        assert size_of(opening.disk) == OLD


@pytest.mark.parametrize(("size", "opens"), [
    (1, False), (4 * MIB - 1, False), (4 * MIB, True), ((1 << 64) - 1, True),
])
def test_a_size_that_has_no_room_for_the_image_is_damage(size: int, opens: bool) -> None:
    """What has no room on the base is told by who knows the base."""
    disk, tables = made(1)
    slot = disk.current()
    index = [disk.slot(0), disk.slot(1)].index(slot)
    fields = slot._asdict() | {"device_bytes": size}
    del fields["crc32c"], fields["crc_fits"]
    disk.put(ubiformat.SLOT_OFFSETS[index], ubiformat.build_slot(**fields))
    opening = Opening(disk, tables)
    opening.run(t.EVENT_START)
    assert (opening.steps.phase == t.PHASE_OPEN) == opens
    assert opens or opening.steps.refusal == t.REFUSE_DAMAGED
