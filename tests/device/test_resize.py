"""Disks that grow, and bases that do or shrink: on a kernel that cannot, on a disk that fails.

Growing under load is the matter of test_recovery.py, being killed amid it of
test_killed_commands.py.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.direct import block_size
from support.guest import BLOCK, fails, flush, read, write
from support.mapper import delayed_writes
from support.ondisk import DATA_OFFSET, read_metadata
from support.served import FLUSH, serve
from support.shell import until
from support.traces import seal_slot
from support.variant import Variant

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Ubi
    from support.images import Image
    from support.mapper import Mapped, Mapper
    from support.stores import Stores
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
HELD_MS = 60_000
pytestmark = pytest.mark.usefixtures("no_watch")


@pytest.fixture
def volume(stores: Stores, mapper: Mapper) -> Mapped:
    """A volume with room for a disk of SIZE; what it grows by holds what somebody wrote once."""
    below = stores.block("ram", DATA_OFFSET + 2 * SIZE)
    with open(below, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"o" * SIZE, DATA_OFFSET + SIZE)
        os.fsync(file.fileno())
    volume = mapper.map(below)
    volume.table(f"0 {(DATA_OFFSET + SIZE) // 512} linear {below} 0")
    return volume


def test_a_block_device_that_grew(
    ubi: Ubi, volume: Mapped, make_image: Callable[..., Image],
) -> None:
    """Nobody reads what was there before; meanwhile the disk serves, and changes no daemon."""
    device = ubi.add(make_image(SIZE), volume.path, stripe_size=STRIPE, recovery=True)
    write(device, SIZE - BLOCK, b"a" * BLOCK)
    refused = ubi.command("resize", device.name, 2 * SIZE)
    assert (refused.code, "grow it first" in refused.stderr) == (1, True), refused
    assert ubi.command("resize", device.name).stdout.startswith(f"{device.name} has {SIZE} bytes")
    device.wait_until_committed()
    volume.delay(write_ms=HELD_MS, flush_ms=0)
    growing = Background(lambda: ubi.command("resize", device.name))
    until(lambda: growing.done or delayed_writes(volume), "the new part is being zeroed", 60)
    upgrade = ubi.command("upgrade", device.name)
    assert (upgrade.code, "being resized" in upgrade.stderr) == (5, True), upgrade
    assert device.status()["state"] == "live"
    assert block_size(device.node) == SIZE
    volume.linear()
    assert growing.result().code == 0, growing.result()
    assert block_size(device.node) == 2 * SIZE
    assert read(device, SIZE, SIZE) == bytes(SIZE)
    write(device, 2 * SIZE - BLOCK, b"e" * BLOCK)
    device.upgrade()
    device.reopen()
    assert read(device, SIZE - BLOCK) == b"a" * BLOCK
    assert read(device, 2 * SIZE - BLOCK) == b"e" * BLOCK


def test_old_data_is_shown_to_who_wants_it(
    ubi: Ubi, volume: Mapped, make_image: Callable[..., Image],
) -> None:
    device = ubi.add(make_image(SIZE), volume.path, stripe_size=STRIPE)
    volume.linear()
    assert ubi.command("resize", device.name, "--keep-old-data").code == 0
    assert read(device, 2 * SIZE - BLOCK) == b"o" * BLOCK


def test_where_the_kernel_cannot_it_grows_when_it_is_added_next(
    ubi: Ubi, tmp_path: Path, volume: Mapped, make_image: Callable[..., Image],
) -> None:
    """What is new of a block device is zeroed by then as well."""
    variant = Variant(tmp_path)
    variant.replace("kernel_device.py", "Feature.CMD_IOCTL_ENCODE | Feature.UPDATE_SIZE",
                    "Feature.CMD_IOCTL_ENCODE")
    with variant.in_use():
        device = ubi.add(make_image(SIZE), volume.path, stripe_size=STRIPE)
    volume.linear()
    refused = ubi.command("resize", device.name)
    assert refused.code == 1
    assert "it has the new size when it is added next" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert block_size(device.node) == device.status()["size"] == SIZE
    assert ubi.command("resize", device.name, SIZE + STRIPE).code == 1
    write(device, 0, b"a" * BLOCK)
    device.reopen()
    assert block_size(device.node) == 2 * SIZE
    assert read(device, 0) == b"a" * BLOCK
    assert read(device, SIZE, SIZE) == bytes(SIZE)


def test_a_volume_that_grew_while_nobody_had_it_keeps_its_disk_as_it_was(
    ubi: Ubi, volume: Mapped, make_image: Callable[..., Image],
) -> None:
    """However it comes back: what is new holds what somebody wrote there, until it is zeroed."""
    image = make_image(SIZE)
    device = ubi.add(image, volume.path, stripe_size=STRIPE)
    write(device, SIZE - BLOCK, b"a" * BLOCK)
    device.stop()
    volume.linear()
    refused = ubi.refused(image, volume.path, code=2, size=2 * SIZE)
    assert f"has a disk of {SIZE} bytes" in refused
    device.start(size=SIZE)
    assert device.warnings == []
    device.reopen(size=None)
    assert ["until `ublk-ubi resize`" in warning for warning in device.warnings] == [True]
    assert block_size(device.node) == device.status()["size"] == SIZE
    device.kill()
    device.start()
    assert block_size(device.node) == SIZE
    assert ubi.command("resize", device.name).code == 0
    assert read(device, SIZE, SIZE) == bytes(SIZE)
    write(device, 2 * SIZE - BLOCK, b"e" * BLOCK)
    device.kill()  # what is not committed is in the table alone, the size on the base
    device.start()
    assert block_size(device.node) == 2 * SIZE
    assert read(device, SIZE - BLOCK) == b"a" * BLOCK
    device.reopen()
    assert device.warnings == []
    assert read(device, 2 * SIZE - BLOCK) == b"e" * BLOCK


@pytest.mark.parametrize("recovery", [True, False])
def test_a_disk_of_before_has_its_size_recorded_by_who_goes_on_with_it(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], recovery: bool,
) -> None:
    """One that is upgraded live is never opened anew."""
    base = make_base(SIZE)
    device = ubi.add(make_image(SIZE), base, stripe_size=STRIPE, recovery=recovery)
    assert read_metadata(base).extension.disk_bytes == SIZE
    device.kill()
    seal_slot(base, disk_bytes=0)
    assert read_metadata(base).extension.disk_bytes == 0
    if recovery:
        device.recover()
    else:
        device.start()
    found = read_metadata(base).extension
    assert (found.disk_bytes, found.generation, found.is_open) == (SIZE, 1, True)
    device.stop()
    assert read_metadata(base).extension.disk_bytes == SIZE


def test_a_base_that_shrank_is_refused(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """A filesystem that finds a part of its disk gone is better not mounted, nor repaired."""
    image, base = make_image(SIZE), make_base(SIZE)
    device = ubi.add(image, base, stripe_size=STRIPE)
    write(device, 0, b"a" * BLOCK)
    assert ubi.command("resize", device.name, 2 * SIZE).code == 0
    device.stop()
    os.truncate(base, DATA_OFFSET + SIZE + STRIPE)
    assert "it was cut off" in ubi.command("check", base).stdout
    refused = ubi.refused(image, base, code=1)
    assert f"add it once with --size {SIZE + STRIPE} to do without the rest" in refused
    device.start(size=SIZE + STRIPE)
    assert block_size(device.node) == SIZE + STRIPE
    device.reopen(size=None)
    assert block_size(device.node) == SIZE + STRIPE
    assert read(device, 0) == b"a" * BLOCK


def test_a_size_that_cannot_be_made_durable_is_not_the_disks(
    ubi: Ubi, undo: Undo, mapper: Mapper, make_image: Callable[..., Image],
) -> None:
    """The fdatasync that fails is everybody's: no flush succeeds from then on."""
    below = serve(undo, DATA_OFFSET + 2 * SIZE)
    volume = mapper.map(below.path)
    volume.table(f"0 {(DATA_OFFSET + SIZE) // 512} linear {below.path} 0")
    device = ubi.add(make_image(SIZE), volume.path, stripe_size=STRIPE)
    volume.linear()
    below.fail(lambda request: request.kind == FLUSH)
    failed = ubi.command("resize", device.name)
    below.heal()
    assert (failed.code, failed.stderr.count("\n")) == (1, 1), failed
    assert "the disk's size cannot be recorded" in failed.stderr
    assert os.strerror(errno.EIO) in failed.stderr
    assert block_size(device.node) == SIZE
    assert fails(flush, device)
    refused = ubi.command("resize", device.name)
    assert (refused.code, "cannot grow" in refused.stderr) == (3, True), refused
    assert ubi.command("del", device.name).code == 3
    device.live = False
    device.start(force_stale=True)
    assert block_size(device.node) == SIZE
    device.stop()


def test_an_image_that_is_cut_short_does_not_matter(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """The disk grows behind what the base records of it; only who opens the base wants it whole."""
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, recovery=True, copy_on_read=True)
    write(device, 0, b"a" * BLOCK)
    os.truncate(image.path, SIZE - 2 * STRIPE)
    until(lambda: ubi.command("status", device.name).code == 3, "it is noticed")
    grown = ubi.command("resize", device.name, 2 * SIZE)
    assert grown.code == 0, grown
    assert device.status()["stripes"]["total"] == SIZE // STRIPE
    assert read(device, SIZE, SIZE) == bytes(SIZE)
    write(device, 2 * SIZE - BLOCK, b"e" * BLOCK)
    device.kill()
    device.recover()
    assert image.path in device.status()["degraded"]
    assert read(device, 2 * SIZE - BLOCK) == b"e" * BLOCK
    device.stop()
    assert f"{SIZE}" in ubi.refused(image, device.options["base"], code=1)
    Path(image.path).write_bytes(image.content)
    device.start(size=None)
    assert device.status()["degraded"] is None
    assert read(device, 0) == b"a" * BLOCK
    assert read(device, SIZE - STRIPE) == image.content[-STRIPE:][:BLOCK]
    assert read(device, 2 * SIZE - BLOCK) == b"e" * BLOCK
