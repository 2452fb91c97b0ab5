"""A failed fdatasync stays failed: the disk may heal, the promise that was broken does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.guest import BLOCK, fails, flush, read, write
from support.ondisk import DATA_OFFSET, read_metadata
from support.served import FLUSH, WRITE, serve
from support.shell import until
from support.variant import Variant

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.served import ServedDisk
    from support.undo import Undo

pytestmark = pytest.mark.cpus(2)

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
KEPT, LOST, LATER = 0, STRIPE, 2 * STRIPE


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image(SIZE)


@pytest.fixture
def base(undo: Undo) -> ServedDisk:
    return serve(undo, DATA_OFFSET + SIZE)


@pytest.fixture
def device(ubi: Ubi, image: Image, base: ServedDisk) -> Device:
    """With stripe 0 durable on the base."""
    device = ubi.add(image, base.path, stripe_size=STRIPE, queues=2, copy_on_read=False)
    write(device, KEPT, b"k" * BLOCK)
    flush(device)
    return device


def latch(device: Device, base: ServedDisk, offset: int) -> None:
    """Let one fdatasync fail: a commit round's, or a queue's if `offset` is in a durable stripe."""
    base.fail(lambda request: request.kind == FLUSH)
    write(device, offset, b"l" * BLOCK)
    assert fails(flush, device)
    base.heal()


def assert_latched(device: Device, base: ServedDisk) -> None:
    """Nothing is promised any more, and everything else works."""
    committed = base.metadata
    base.forget()
    for _ in range(2):
        assert fails(flush, device)
        assert fails(write, device, KEPT, b"f" * BLOCK, fua=True)
        assert fails(write, device, LATER, b"f" * BLOCK, fua=True)
        write(device, LATER, b"w" * BLOCK)
        write(device, 3 * STRIPE, b"w" * STRIPE)
        assert read(device, LATER) == b"w" * BLOCK
    ticks = device.status()["uptime_s"] + 2.2
    until(lambda: device.status()["uptime_s"] > ticks, "two ticks have passed")
    assert fails(flush, device)
    assert base.metadata == committed
    assert not any(request.is_metadata_write for request in base.seen)


@pytest.mark.parametrize("offset", [LOST, KEPT], ids=["commit-round", "queue"])
def test_a_failed_fdatasync_stays_failed(
    ubi: Ubi, image: Image, base: ServedDisk, device: Device, offset: int,
) -> None:
    latch(device, base, offset)
    assert_latched(device, base)

    # Everybody is told.
    shown = ubi.command("status", device.name, "--json")
    assert shown.code == 3
    assert os.strerror(errno.EIO) in shown.json()["degraded"]
    assert base.path in shown.json()["degraded"]
    listed = ubi.command("list", "--json").json()["devices"]
    assert next(entry["degraded"] for entry in listed if entry["name"] == device.name)

    # `del` takes it away, says what it could not do, and leaves the base as it is.
    left = base.metadata
    gone = ubi.command("del", device.name)
    device.live = False
    assert gone.code == 3
    assert gone.stderr.count("\n") == 1
    assert base.path in gone.stderr
    assert not os.path.exists(device.node)
    assert base.metadata == left
    found = read_metadata(base.path)
    assert (found.minor, found.extension.is_open) == (2, True)

    # `add` does not forget it; nothing is written.
    base.forget()
    line = ubi.refused(image, base.path, code=3)
    assert "--force-stale" in line
    assert base.path in line
    assert not any(request.changes and request.kind != FLUSH for request in base.seen)

    # What goes on is what was durable.
    device.start(force_stale=True)
    assert read(device, KEPT) == (b"l" if offset == KEPT else b"k") * BLOCK
    assert read(device, LOST, 3 * STRIPE) == image.content[LOST : LOST + 3 * STRIPE]
    write(device, LOST, b"n" * BLOCK)
    flush(device)
    status = device.status()
    assert (status["degraded"], status["generation"]) == (None, 2)
    device.stop()
    assert not read_metadata(base.path).extension.is_open


def test_a_killed_daemon_leaves_its_latch(
    ubi: Ubi, image: Image, base: ServedDisk, device: Device,
) -> None:
    latch(device, base, LOST)
    committed = base.metadata
    device.kill()
    assert ubi.command("status", device.name).code == 3
    for _ in range(2):
        assert "--force-stale" in ubi.refused(image, base.path, code=3, name=device.name)
    assert base.metadata == committed
    assert ubi.command("del", device.name, "--if-exists").code == 0
    assert "--force-stale" in ubi.refused(image, base.path, code=3)
    device.start(force_stale=True)
    assert read(device, KEPT) == b"k" * BLOCK
    device.stop()


def test_one_failure_is_everybodys(
    ubi: Ubi, image: Image, base: ServedDisk, device: Device,
) -> None:
    """Whoever is told first, no flush that came before or comes after may succeed."""
    flushes = [device.open() for _ in range(4)]
    try:
        base.hold(lambda request: request.kind == FLUSH)
        write(device, LOST, b"l" * BLOCK)
        waiting = [Background(disk.fsync) for disk in flushes]
        base.wait_for_held()
        base.fail(lambda request: request.kind == FLUSH)
        base.release(apply=False)
        assert [flushed.errno() for flushed in waiting] == [errno.EIO] * len(waiting)
        base.heal()
        assert [Background(disk.fsync).errno() for disk in flushes] == [errno.EIO] * len(flushes)
    finally:
        for disk in flushes:
            disk.close()
    assert ubi.command("del", device.name).code == 3
    device.live = False
    device.start(force_stale=True).stop()


def test_a_disk_that_fails_its_flushes(
    ubi: Ubi, image: Image, make_base: Callable[..., str], mapper: Mapper,
) -> None:
    """dm-flakey behind the end of what is written: data goes through, no flush does."""
    disk = mapper.map(make_base(SIZE + MIB, on="loop"))
    sound = disk.sectors - MIB // 512
    device = ubi.add(image, disk.path, stripe_size=STRIPE, zero=True)
    write(device, KEPT, b"k" * BLOCK)
    flush(device)
    disk.table(
        f"0 {sound} linear {disk.below} 0\n"
        f"{sound} {MIB // 512} flakey {disk.below} {sound} 0 3600 1 error_writes",
    )
    write(device, LOST, b"l" * BLOCK)
    assert fails(flush, device)
    disk.linear()
    assert fails(flush, device)
    assert read(device, LOST) == b"l" * BLOCK
    assert read_metadata(disk.path).hydrated == {0}
    assert ubi.command("status", device.name).code == 3
    assert ubi.command("del", device.name).code == 3
    device.live = False
    device.start(force_stale=True)
    assert read(device, KEPT) == b"k" * BLOCK
    flush(device)
    device.stop()


def test_a_failure_at_the_opening_is_not_forgotten(
    ubi: Ubi, image: Image, base: ServedDisk, device: Device,
) -> None:
    """What a killed daemon wrote may be lost with it, and no later fdatasync would tell."""
    base.fail(lambda request: request.is_metadata_write)
    write(device, LOST, b"l" * BLOCK)
    device.kill()
    base.fail(lambda request: request.kind == FLUSH)
    committed = base.metadata
    assert base.path in ubi.refused(image, base.path, code=1, name=device.name)
    base.heal()
    assert "--force-stale" in ubi.refused(image, base.path, code=3, name=device.name)
    assert base.metadata == committed
    device.start(force_stale=True)
    assert read(device, KEPT) == b"k" * BLOCK
    assert read(device, LOST) == image.content[LOST : LOST + BLOCK]
    flush(device)
    device.stop()


def test_a_durable_write_to_a_buffered_base_answers_for_itself(
    ubi: Ubi, image: Image, base: ServedDisk, tmp_path: Path,
) -> None:
    """The page cache tells each open file once of what it could not write: whoever asks first is
    told, not who has written it."""
    variant = Variant(tmp_path / "variant")
    variant.replace("base.py", "alignment = enable_direct(base.fd)", "alignment = 0")
    with variant.in_use():
        device = ubi.add(image, base.path, stripe_size=STRIPE, cache="writethrough",
                         copy_on_read=False)
    assert device.status()["base_direct"] is False
    for stripe in (KEPT, LATER):
        write(device, stripe, b"k" * BLOCK)
    device.wait_until_committed()

    # Of two blocks the first cannot be written, the other is on its way.
    Path("/sys/block", os.path.basename(base.path), "queue/max_sectors_kb").write_text("4")
    base.fail(lambda asked: asked.kind == WRITE and asked.offset == DATA_OFFSET + KEPT)
    base.hold(lambda asked: asked.kind == WRITE and asked.offset == DATA_OFFSET + KEPT + BLOCK)
    lost = Background(lambda: write(device, KEPT, b"l" * 2 * BLOCK))
    base.wait_for_held()
    other = Background(lambda: write(device, LATER, b"o" * BLOCK))
    other.wait(1.0)
    base.heal()
    assert lost.errno() == errno.EIO
    assert other.errno() == errno.EIO
    assert fails(write, device, LATER, b"p" * BLOCK)
    assert base.path in device.status()["degraded"]
    assert ubi.command("del", device.name).code == 3
    device.live = False
    device.start(force_stale=True).stop()
