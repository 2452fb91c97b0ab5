"""Whose disk is it: copies, stale and foreign tables, foreign writers, and who holds what."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.device import RUN_ROOT
from support.guest import BLOCK, fails, flush, read, write
from support.ondisk import DATA_OFFSET, read_metadata
from support.served import serve
from support.traces import assert_unchanged, seal_slot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.device import Device, Ubi
    from support.images import Image
    from support.served import ServedDisk
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
TABLES = RUN_ROOT / ".tables"
FORCE = "--force-stale"


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image(SIZE)


@pytest.fixture
def device(ubi: Ubi, image: Image, make_base: Callable[..., str]) -> Device:
    """With stripe 0 durable, on a file."""
    device = ubi.add(image, make_base(SIZE), size=SIZE, stripe_size=STRIPE, copy_on_read=False)
    write(device, 0, b"k" * BLOCK)
    flush(device)
    return device


def copy(path: str) -> str:
    target = f"{path}.copy"
    shutil.copyfile(path, target)
    return target


def table_of(base: str) -> Path:
    return TABLES / read_metadata(base).extension.uuid.hex()


def kill_with_uncommitted(device: Device, base: ServedDisk) -> None:
    """Leave a write that the table alone knows of."""
    base.fail(lambda request: request.is_metadata_write)
    write(device, STRIPE, b"u" * BLOCK)
    assert fails(flush, device)
    device.kill()
    base.heal()


# -- copies ---------------------------------------------------------------------------------------

def test_a_copy_beside_a_live_disk(ubi: Ubi, image: Image, device: Device) -> None:
    base = device.options["base"]
    taken_live = copy(base)
    device.stop()
    taken_closed = f"{base}.closed"
    shutil.copyfile(base, taken_closed)
    device.start()
    for path in (taken_live, taken_closed):
        with assert_unchanged(path):
            line = ubi.refused(image, path, code=5)
        assert path in line
        assert "copy" in line
        assert str(uuid.UUID(bytes=read_metadata(base).extension.uuid)) in line
    assert read(device, 0) == b"k" * BLOCK


def test_copies_after_a_crash(ubi: Ubi, image: Image, device: Device) -> None:
    base = device.options["base"]
    taken_live = copy(base)
    taken_closed = f"{base}.closed"
    device.reopen()
    device.stop()
    shutil.copyfile(base, taken_closed)
    device.start()
    write(device, STRIPE, b"u" * BLOCK)
    device.kill()
    for path in (taken_live, taken_closed, copy(base)):
        with assert_unchanged(path):
            line = ubi.refused(image, path, code=1)
        assert path in line
        assert FORCE in line
        assert "without the record of writes" in line
    # The original is the one that the record of writes is of.
    device.start()
    assert read(device, STRIPE) == b"u" * BLOCK
    device.stop()
    # And once it is closed, a copy that was closed is a disk like any other.
    ubi.add(image, taken_closed).stop()
    # One that was not may lack what was acknowledged: only when told so.
    assert FORCE in ubi.refused(image, taken_live, code=1)
    late = ubi.add(image, taken_live, force_stale=True)
    assert read(late, 0) == b"k" * BLOCK
    late.stop()


def test_a_copy_that_is_forced_takes_nothing_from_the_original(
    ubi: Ubi, image: Image, device: Device,
) -> None:
    """What the original's guests were told of is known to its record of writes alone."""
    write(device, STRIPE, b"u" * BLOCK)
    device.kill()
    forced = ubi.add(image, copy(device.options["base"]), force_stale=True)
    uuid = forced.status()["uuid"]
    device.start()
    assert device.status()["uuid"] != uuid
    assert read(device, STRIPE) == b"u" * BLOCK
    forced.reopen()
    assert forced.status()["uuid"] == uuid


def test_two_at_once_open_one_disk_and_its_copy(ubi: Ubi, image: Image, device: Device) -> None:
    """Whoever comes first: one is live, the other is told so."""
    base = device.options["base"]
    device.stop()
    pair = [ubi.new(image, path) for path in (base, copy(base))]
    for one in pair:
        one.begin_start()
    lived, refused = [], []
    for one in pair:
        try:
            lived.append(one.finish_start())
        except AssertionError as error:
            refused.append(error)
    assert (len(lived), len(refused)) == (1, 1)
    assert refused[0].code == 5, refused[0]
    assert read(lived[0], 0) == b"k" * BLOCK


# -- tables ---------------------------------------------------------------------------------------

def test_no_table(ubi: Ubi, undo: Undo, image: Image) -> None:
    base = serve(undo, DATA_OFFSET + SIZE)
    device = ubi.add(image, base.path, stripe_size=STRIPE, copy_on_read=False)
    write(device, 0, b"k" * BLOCK)
    flush(device)
    kill_with_uncommitted(device, base)
    table_of(base.path).unlink()
    with assert_unchanged(base.path):
        line = ubi.refused(image, base.path, code=1, name=device.name)
    assert base.path in line
    assert "acknowledged writes may be lost" in line
    assert FORCE in line
    device.start(force_stale=True)
    assert read(device, 0) == b"k" * BLOCK
    assert read(device, STRIPE) == image.content[STRIPE : STRIPE + BLOCK]
    assert device.status()["generation"] == 2
    device.stop()


def test_after_a_power_loss_there_is_no_table_to_miss(
    ubi: Ubi, undo: Undo, image: Image,
) -> None:
    """Open in another boot: what is durable counts, and nobody needs to be asked."""
    base = serve(undo, DATA_OFFSET + SIZE)
    device = ubi.add(image, base.path, stripe_size=STRIPE, copy_on_read=False)
    write(device, 0, b"k" * BLOCK)
    flush(device)
    kill_with_uncommitted(device, base)
    table = table_of(base.path)
    seal_slot(base.path, boot_id=b"another boot 123")
    # A table is of this boot: it cannot be of that disk.
    assert FORCE in ubi.refused(image, base.path, code=1, name=device.name)
    table.unlink()
    device.start()
    assert read(device, 0) == b"k" * BLOCK
    assert read(device, STRIPE) == image.content[STRIPE : STRIPE + BLOCK]
    device.stop()


def test_a_table_that_is_not_this_disks(ubi: Ubi, image: Image, device: Device) -> None:
    base = device.options["base"]
    table = table_of(base)
    other_base = f"{base}.other"
    other = ubi.add(image, other_base, size=SIZE, stripe_size=STRIPE)
    earlier, others = table.read_bytes(), table_of(other_base).read_bytes()
    other.stop()
    device.reopen()
    write(device, STRIPE, b"u" * BLOCK)
    device.kill()
    its_own = table.read_bytes()
    wrong = {
        "damaged": b"\1" + its_own[1:],
        "short": its_own[:-1],
        "empty": b"",
        "of an earlier opening": earlier,
        "of another disk": others,
    }
    for what, content in wrong.items():
        table.write_bytes(content)
        with assert_unchanged(base):
            line = ubi.refused(image, base, code=1, name=device.name)
        assert base in line, what
        assert FORCE in line, what
        assert table.read_bytes() == content, what
    table.write_bytes(its_own)
    device.start()
    assert read(device, STRIPE) == b"u" * BLOCK
    device.kill()
    table.write_bytes(earlier)
    device.start(force_stale=True)
    assert read(device, 0) == b"k" * BLOCK
    device.stop()


def test_a_foreign_writer(ubi: Ubi, image: Image, device: Device) -> None:
    """A header bit that the table does not have."""
    base = device.options["base"]
    device.kill()
    with open(base, "r+b") as file:
        os.pwrite(file.fileno(), b"\1", 14 + 2 * 7)
    with assert_unchanged(base):
        line = ubi.refused(image, base, code=1, name=device.name)
    assert base in line
    assert "another program" in line
    assert FORCE in line
    device.start(force_stale=True)
    assert read(device, 7 * STRIPE) == bytes(BLOCK), "the base has it, it says"
    device.stop()


# -- who holds it ---------------------------------------------------------------------------------

@pytest.mark.parametrize("on", ["ext4", "ram"])
def test_a_base_in_use(
    ubi: Ubi, image: Image, make_base: Callable[..., str], on: str,
) -> None:
    base = make_base(SIZE, on=on)
    device = ubi.add(image, base, **({"size": SIZE} if on == "ext4" else {}))
    line = ubi.refused(image, base, code=5)
    assert base in line
    assert device.name in line
    # A disk that is written is nobody's image, an image that is read nobody's base.
    assert base in ubi.refused(base, f"{image.path}.base", code=5)
    assert not os.path.exists(f"{image.path}.base")
    other = ubi.new(base, image.path)
    outcome = other.begin_start(format=True).outcome()
    assert outcome.code == 5, outcome
    image.assert_untouched()
    assert read(device, 0) == image.content[:BLOCK]


def test_a_base_that_two_want(ubi: Ubi, image: Image, make_base: Callable[..., str]) -> None:
    base = make_base(SIZE)
    three = [ubi.new(image, base, size=SIZE) for _ in range(3)]
    running = [one.begin_start() for one in three]
    outcomes = [Background(one.outcome).result(60.0) for one in running]
    assert sorted(outcome.code for outcome in outcomes) == [0, 5, 5], outcomes
    winner = next(one for one, outcome in zip(three, outcomes, strict=True) if outcome.code == 0)
    for outcome in outcomes:
        if outcome.code:
            assert base in outcome.stderr
            assert outcome.stderr.count("\n") == 1
    assert ubi.command("del", winner.name).code == 0


def test_slots_are_what_this_file_thinks(device: Device) -> None:
    """The test's own writer of slots makes what the product takes for its own."""
    base = device.options["base"]
    device.stop()
    before = read_metadata(base)
    seal_slot(base)
    assert read_metadata(base) == before


# -- another disk on the same base ----------------------------------------------------------------

def test_a_new_disk_on_a_crashed_ones_base_takes_its_table_along(
    image: Image, device: Device,
) -> None:
    base = device.options["base"]
    before = table_of(base)
    device.kill()
    assert before.exists()
    device.start(format=True)
    assert [path.name for path in TABLES.iterdir()] == [table_of(base).name]
    assert not before.exists()
    assert read(device, 0, BLOCK) == image.content[:BLOCK]


def test_another_image_by_force_amid_a_crash_is_asked_for_until_it_is_recorded(
    ubi: Ubi, device: Device, make_image: Callable[..., Image],
) -> None:
    """What the base records is written when it is opened; one that goes on was open."""
    other = make_image(SIZE, holes=1.0)
    device.kill()
    assert "--force" in ubi.refused(other, device.options["base"], code=1)
    device.start(image=other.path, force=True)
    assert any("--force once more" in warning for warning in device.warnings)
    assert read(device, 0, BLOCK) == b"k" * BLOCK
    assert read(device, STRIPE, BLOCK) == bytes(BLOCK)
    device.stop()
    assert "--force" in ubi.refused(other, device.options["base"], code=1)
    device.start(force=True)
    assert not device.warnings
    device.reopen(force=None)
    assert read(device, 0, BLOCK) == b"k" * BLOCK
