"""What each cache mode promises, seen by the kernel and on a base whose own cache loses power."""

from __future__ import annotations

import fcntl
import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.guest import BLOCK, flush, write
from support.ondisk import DATA_OFFSET, read_metadata
from support.served import FLUSH, serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.served import ServedDisk
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
STRIPES = SIZE // STRIPE
BLKZEROOUT = 0x127F


@pytest.fixture
def base(undo: Undo) -> ServedDisk:
    """A disk with a volatile cache."""
    disk = serve(undo, DATA_OFFSET + SIZE)
    disk.be_volatile()
    return disk


@pytest.mark.parametrize(("cache", "shown", "fua"), [
    ("writeback", "write back", "1"), ("writethrough", "write through", "0"),
    ("unsafe", "write back", "1"),
])
def test_the_kernel_is_told(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
    cache: str, shown: str, fua: str,
) -> None:
    device = ubi.add(make_image(MIB), make_base(MIB), cache=cache, stripe_size=STRIPE)
    queue = Path("/sys/block", os.path.basename(device.node), "queue")
    assert (queue / "write_cache").read_text() == f"{shown}\n"
    assert (queue / "fua").read_text() == f"{fua}\n"
    assert device.status()["cache"] == cache


def change(device: Device, content: bytearray, seed: int, count: int = 60) -> set[int]:
    """Writes and zeroes of parts, whole stripes and hot places; the stripes that are changed."""
    rng = random.Random(seed)
    changed = set()
    with device.open() as disk:
        for number in range(count):
            stripe = rng.randrange(STRIPES)
            whole = rng.random() < 0.3
            at = stripe * STRIPE + (0 if whole else rng.randrange(STRIPE // 512) // 2 * 512)
            length = STRIPE if whole else rng.randint(1, 64) * 512
            data = bytes([number + 1]) * length
            if rng.random() < 0.3:
                data = bytes(length)
                fcntl.ioctl(disk.fd, BLKZEROOUT, struct.pack("=QQ", at, length))
            else:
                disk.pwrite(data, at)
            content[at : at + length] = data
            changed.add(stripe)
    return changed


def lost(base: ServedDisk, content: bytearray, changed: set[int]) -> list[int]:
    """The changed stripes that a power loss now takes, header bit or data."""
    bits = read_metadata(base.path).hydrated
    return [
        stripe for stripe in sorted(changed)
        if stripe not in bits
        or base.at(DATA_OFFSET + stripe * STRIPE, STRIPE)
        != content[stripe * STRIPE : (stripe + 1) * STRIPE]
    ]


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("cache", ["writethrough", "writeback"])
def test_a_power_loss(
    ubi: Ubi, make_image: Callable[..., Image], base: ServedDisk, seed: int, cache: str,
) -> None:
    """In writethrough nothing that has completed is lost, and no flush was needed. In writeback it
    may be: so this test would notice."""
    image = make_image(SIZE)
    device = ubi.add(image, base.path, stripe_size=STRIPE, cache=cache)
    if cache == "writeback":
        # Else a tick that comes right before the end leaves nothing to lose.
        base.fail(lambda request: request.is_metadata_write)
    content = bytearray(image.content)
    changed = change(device, content, seed)
    assert device.status()["io"]["flush"]["count"] == 0
    assert device.status()["io"]["write_zeroes"]["count"] > 0
    device.kill()
    base.lose_power()
    if cache == "writethrough":
        assert lost(base, content, changed) == []
    else:
        assert lost(base, content, changed)


def test_writeback_and_a_flush(
    ubi: Ubi, make_image: Callable[..., Image], base: ServedDisk, seed: int,
) -> None:
    image = make_image(SIZE)
    device = ubi.add(image, base.path, stripe_size=STRIPE)
    content = bytearray(image.content)
    changed = change(device, content, seed)
    flush(device)
    device.kill()
    base.lose_power()
    assert lost(base, content, changed) == []


def test_unsafe_answers_flushes_itself(
    ubi: Ubi, make_image: Callable[..., Image], base: ServedDisk, seed: int,
) -> None:
    """The base is not flushed for a guest; what a tick has committed is consistent all the same."""
    image = make_image(SIZE)
    device = ubi.add(image, base.path, stripe_size=STRIPE, cache="unsafe")
    content = bytearray(image.content)
    changed = change(device, content, seed)
    device.wait_until_committed()
    base.forget()
    with device.open(os.O_RDWR | os.O_DSYNC) as disk:
        for number in range(10):
            disk.pwrite(bytes([200 + number]) * BLOCK, min(changed) * STRIPE)
            disk.fsync()
    assert not any(request.kind == FLUSH or request.fua for request in base.seen)
    status = device.status()
    assert status["io"]["flush"]["count"] >= 10
    assert (status["queue_syncs"], status["commit"]["joined"]) == (0, 0)

    # A stripe whose bit is set was whole when it was set, whatever was written later.
    device.kill()
    base.lose_power()
    bits = read_metadata(base.path).hydrated
    assert bits >= changed
    for stripe in bits - {min(changed)}:
        assert base.at(DATA_OFFSET + stripe * STRIPE, STRIPE) == (
            content[stripe * STRIPE : (stripe + 1) * STRIPE])


def test_unsafe_commits_in_order(
    ubi: Ubi, make_image: Callable[..., Image], base: ServedDisk, seed: int,
) -> None:
    """Killed and out of power at any time: no bit without the data of its stripe."""
    image = make_image(SIZE)
    device = ubi.add(image, base.path, stripe_size=STRIPE, cache="unsafe")
    rng = random.Random(seed)
    for number, stripe in enumerate(rng.sample(range(STRIPES), 40)):
        write(device, stripe * STRIPE + 512, bytes([stripe + 1]) * 512)
        if number in (5, 25):
            device.wait_until_committed()
    device.kill()
    base.lose_power()
    bits = read_metadata(base.path).hydrated
    assert len(bits) >= 26
    for stripe in bits:
        found = base.at(DATA_OFFSET + stripe * STRIPE, STRIPE)
        start = stripe * STRIPE
        assert found[:512] + found[1024:] == (
            image.content[start : start + 512] + image.content[start + 1024 : start + STRIPE])
