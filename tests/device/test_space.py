"""Room: what a full filesystem of the base does, what is left alone of it, what is given back."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from typing import TYPE_CHECKING, Any

import pytest
from support.direct import assert_content
from support.guest import BLOCK, fails, flush, read, write
from support.ondisk import read_metadata
from support.shell import run, until
from support.variant import Variant

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.device import Device, Ubi
    from support.images import Image
    from support.stores import Stores
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 8 * MIB
STRIPES = SIZE // STRIPE


@pytest.fixture
def small(stores: Stores) -> Path:
    return stores.small(64 * MIB)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes of its filesystem free."""
    path, size = folder / "filler", 0
    with open(path, "wb") as file:
        for piece in (MIB, 64 << 10, 4096):    # the last ones are hard to get
            while (space := os.statvfs(folder)).f_bavail * space.f_frsize >= leave + piece:
                try:
                    os.posix_fallocate(file.fileno(), size, piece)
                except OSError as error:
                    assert error.errno == errno.ENOSPC, error
                    break
                size += piece
    return path


def hydration(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = device.status()["hydration"]
    return found


def wait_for_state(device: Device, state: str) -> dict[str, Any]:
    return until(
        lambda: found if (found := hydration(device))["state"] == state else {},
        f"hydration is {state!r}", 20.0,
    )


def errno_of(call: Callable[..., object], *words: object) -> int | None:
    try:
        call(*words)
    except OSError as error:
        return error.errno
    return None


# -- a full filesystem ----------------------------------------------------------------------------

@pytest.mark.data_paths("zero-copy", "copy")
def test_a_full_filesystem_fails_what_needs_room_and_nothing_else(
    ubi: Ubi, make_image: Callable[..., Image], small: Path,
) -> None:
    image = make_image(SIZE)
    base = small / "base"
    device = ubi.add(image, base, stripe_size=STRIPE, size=2 * SIZE, copy_on_read=False)
    expected = bytearray(image.as_disk(2 * SIZE))
    write(device, 0, b"h" * BLOCK)
    write(device, SIZE + STRIPE, b"t" * BLOCK)
    flush(device)
    filler = fill(small, 0)

    # A part of a stripe, a whole one, behind the image, zeroes that keep their room.
    for at, length in ((STRIPE, BLOCK), (2 * STRIPE, STRIPE), (SIZE + 2 * STRIPE, BLOCK)):
        assert errno_of(write, device, at, b"n" * length) == errno.ENOSPC, at
    with device.open() as disk:
        assert errno_of(os.posix_fallocate, disk.fd, 0, BLOCK) is not None
    # What has its room is written; everything is read; flushes succeed.
    write(device, BLOCK, b"i" * BLOCK)
    write(device, SIZE + STRIPE, b"u" * BLOCK)
    flush(device)
    expected[: 2 * BLOCK] = b"h" * BLOCK + b"i" * BLOCK
    expected[SIZE + STRIPE : SIZE + STRIPE + BLOCK] = b"u" * BLOCK
    assert_content(device.node, expected, "the disk on a full filesystem")
    status = device.status()
    assert (status["state"], status["degraded"]) == ("live", None)
    assert status["io"]["write"]["errors"] == 3
    assert read_metadata(str(base)).hydrated == {0}

    filler.unlink()
    for at, length in ((STRIPE, BLOCK), (2 * STRIPE, STRIPE), (SIZE + 2 * STRIPE, BLOCK)):
        write(device, at, b"n" * length)
        expected[at : at + length] = b"n" * length
    flush(device)
    assert_content(device.node, expected, "the disk with room again")
    device.reopen()
    assert_content(device.node, expected, "the disk, reopened")


def test_a_buffered_base_that_runs_full_is_latched(
    ubi: Ubi, make_image: Callable[..., Image], stores: Stores, tmp_path: Path,
) -> None:
    """Written back too late to fail a write, it fails the flush: from then on none succeeds."""
    variant = Variant(tmp_path / "variant")
    variant.replace("base.py", "alignment = enable_direct(base.fd)", "alignment = 0")
    image = make_image(SIZE)
    point, outer = stores.hollow(64 * MIB, 32 * MIB)
    base = point / "base"
    with variant.in_use():
        device = ubi.add(image, base, stripe_size=STRIPE, copy_on_read=False)
        assert device.status()["base_direct"] is False
        write(device, 0, b"k" * BLOCK)
        flush(device)
        filler = fill(outer, 0)
        write(device, STRIPE, b"l" * BLOCK)
        assert errno_of(flush, device) in (errno.EIO, errno.ENOSPC)
        filler.unlink()
        assert fails(flush, device)
        assert fails(write, device, 0, b"f" * BLOCK, fua=True)
        assert read(device, 0) == b"k" * BLOCK
        degraded = device.status()["degraded"]
        assert os.strerror(errno.ENOSPC) in degraded
        assert str(base) in degraded
        assert ubi.command("del", device.name).code == 3
        device.live = False
        device.start(force_stale=True)
        assert read(device, 0) == b"k" * BLOCK
        assert read(device, STRIPE) == image.content[STRIPE : STRIPE + BLOCK]
        write(device, STRIPE, b"n" * BLOCK)
        flush(device)
        assert device.status()["degraded"] is None
        device.stop()


# -- room that is left alone -------------------------------------------------------------------

def test_it_leaves_room_on_the_filesystem_of_the_base(
    ubi: Ubi, make_image: Callable[..., Image], small: Path,
) -> None:
    image = make_image(SIZE)
    filler = fill(small, 16 * MIB)
    device = ubi.add(
        image, small / "base", stripe_size=STRIPE, hydrate=True, rate=MIB, min_free="20M",
    )
    wait_for_state(device, "low-space")
    device.wait_until_committed()
    before, uptime = device.stripes()["hydrated"], device.status()["uptime_s"]
    until(lambda: device.status()["uptime_s"] > uptime + 1.5, "time passes")
    assert device.stripes()["hydrated"] == before < STRIPES // 2
    assert device.status()["degraded"] is None
    # Demand takes what there is.
    write(device, 100 * STRIPE, b"d" * BLOCK)
    assert device.stripes()["hydrated"] == before + 1

    device.hydrate(rate="max")
    filler.unlink()
    device.wait_until_independent()
    expected = bytearray(image.content)
    expected[100 * STRIPE : 100 * STRIPE + BLOCK] = b"d" * BLOCK
    assert_content(device.node, expected, "the disk")


def test_it_takes_no_room_that_is_to_be_left(
    ubi: Ubi, make_image: Callable[..., Image], small: Path,
) -> None:
    """At full speed it took all that there was between two looks at the room."""
    device = ubi.add(make_image(SIZE), small / "base", stripe_size=STRIPE, min_free="20M")
    fill(small, 20 * MIB + 8 * STRIPE)
    until(lambda: device.status()["space"]["free"] < 21 * MIB, "it has seen that")
    device.hydrate(run=True)
    wait_for_state(device, "low-space")
    space = os.statvfs(small)
    assert space.f_bavail * space.f_frsize >= 20 * MIB - 2 * STRIPE
    assert device.stripes()["hydrated"] >= 4


def test_a_full_filesystem_ends_a_pass_and_room_the_next(
    ubi: Ubi, make_image: Callable[..., Image], small: Path,
) -> None:
    image = make_image(SIZE)
    device = ubi.add(image, small / "base", stripe_size=STRIPE, min_free="0")
    filler = fill(small, 2 * MIB)
    device.hydrate(run=True)
    found = wait_for_state(device, "waiting")
    assert found["last_error"] == 28
    assert found["failed"] <= 16, "nobody tries them all where there is no room"
    assert device.status()["degraded"] is None
    there = device.stripes()["hydrated"]
    assert 8 <= there < STRIPES
    assert read(device, SIZE - BLOCK) == image.content[SIZE - BLOCK :]
    filler.unlink()
    device.wait_until_independent()
    assert_content(device.node, image.content, "the disk")


# -- room that is given back ----------------------------------------------------------------------

def test_fstrim_hydrates_nothing_and_gives_room_back(
    ubi: Ubi, stores: Stores, make_base: Callable[..., str], undo: Undo, tmp_path: Path, seed: int,
) -> None:
    """Of an image that is a filesystem: while it is cold, and once all of it is on the base."""
    folder = stores.folder("ext4")
    image, tree = folder / "image", folder / "tree"
    tree.mkdir()
    rng = random.Random(seed)
    files = {name: rng.randbytes(12 * MIB) for name in ("kept", "removed")}
    for name, data in files.items():
        (tree / name).write_bytes(data)
    image.write_bytes(b"\xa5" * (64 * MIB))                # no holes, so that room is a matter
    run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-d", tree, image)
    base = make_base(0)
    device = ubi.add(image, base, stripe_size=STRIPE, copy_on_read=False)
    point = tmp_path / "mnt"
    point.mkdir()
    mounted = contextlib.ExitStack()
    undo.enter_context(mounted)

    def mount(*options: str) -> None:
        run("mount", *options, device.node, point)
        mounted.callback(run, "umount", point)

    mount("-o", "noatime,noinit_itable")
    run("sync", "-f", point)

    before = device.stripes()["hydrated"]
    freed = int(run("fstrim", "-v", point).split("(")[1].split()[0])
    assert freed > 30 * MIB
    assert device.stripes()["hydrated"] == before
    assert device.status()["io"]["discard"]["count"] > 0
    assert (point / "kept").read_bytes() == files["kept"]

    device.hydrate(run=True)
    device.wait_until_independent()
    assert os.stat(base).st_blocks * 512 > 64 * MIB
    mounted.close()                        # ext4 keeps in mind what it has trimmed
    mount("-o", "noatime,noinit_itable")
    (point / "removed").unlink()
    run("sync", "-f", point)
    run("fstrim", "-v", point)
    kept = os.stat(base).st_blocks * 512
    assert kept < 40 * MIB, "the free blocks of a filesystem that is 64 MiB large"
    until(lambda: device.status()["space"]["allocated"] <= kept + MIB, "the status tells the same")
    assert [counts["errors"] for counts in device.status()["io"].values()] == [0] * 5
    mounted.close()
    run("e2fsck", "-fn", device.node)
    device.options["image"] = None
    device.reopen()
    mount("-o", "ro")
    assert (point / "kept").read_bytes() == files["kept"]
    assert not (point / "removed").exists()
    mounted.close()
