"""Image and base as files and as block devices of many kinds; block sizes; the size of the disk."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from support import ondisk
from support.direct import assert_content, assert_same, read_direct
from support.shell import run
from support.stores import BLOCK_DEVICES

KIB, MIB = 1 << 10, 1 << 20
STRIPE = 256 * KIB
IMAGE_SIZE = 6 * MIB
DISK_SIZE = 8 * MIB
# image on, base on
PAIRS = [
    ("xfs", "xfs"), ("hostfs", "tmpfs"), ("tmpfs", "hostfs"),  # file, file
    ("ext4", "ubd"),                                           # file, block
    ("loop", "ext4"),                                          # block, file
    ("ram", "dm"), ("ubd", "loop"),                            # block, block
]


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize(("image_on", "base_on"), PAIRS)
def test_kinds(ubi, make_image, make_base, seed, image_on, base_on):
    image = make_image(IMAGE_SIZE, on=image_on, holes=0.2)
    base = make_base(DISK_SIZE, on=base_on)
    # A block device is as large as it is, and what may lie behind the image is zeroed when told.
    options = {"zero": True} if base_on in BLOCK_DEVICES else {"size": DISK_SIZE}
    device = ubi.add(image, base, stripe_size=STRIPE, **options)
    assert device.size == DISK_SIZE
    status = device.status()
    # tmpfs takes O_DIRECT since 6.6, hostfs never.
    for key, on in (("image_direct", image_on), ("base_direct", base_on)):
        assert on == "tmpfs" or status[key] == (on != "hostfs")
    buffered = not (status["image_direct"] and status["base_direct"])
    assert any("O_DIRECT" in warning for warning in device.warnings) == buffered
    expected = bytearray(image.as_disk(DISK_SIZE))
    assert_content(device.node, expected, "the disk")

    rng = random.Random(seed)
    with device.open() as disk:
        for number in range(20):
            length = rng.randint(1, 600) * 512
            offset = rng.randrange((DISK_SIZE - length) // 512 + 1) * 512
            data = rng.randbytes(length)
            disk.pwrite(data, offset)
            expected[offset : offset + length] = data
            if number % 5 == 0:
                disk.fsync()
    assert_content(device.node, expected, "the disk, written")
    device.reopen(zero=None)
    if base_on != "hostfs":
        assert device.stripes()["hydrated"] == len(ondisk.read_metadata(base).hydrated)
    assert_content(device.node, expected, "the disk, reopened")
    image.assert_untouched()


def test_a_used_block_device_is_zeroed_behind_the_image(ubi, make_image, stores):
    image = make_image(3 * MIB + 1)
    base = stores.block("ubd", 8 * MIB + DISK_SIZE)
    with open(base, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"a tenant's secret" * 100_000, 8 * MIB + 3 * MIB)
        os.fsync(file.fileno())
    device = ubi.add(image, base, stripe_size=STRIPE, zero=True)
    assert_content(device.node, image.as_disk(DISK_SIZE), "the disk")


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("how", ["option", "loop"])
def test_blocks_of_4096_bytes(ubi, make_image, make_base, stores, how):
    image = make_image(5 * MIB + 513)
    if how == "option":
        base, options = make_base(0), {"block_size": 4096}
        with open(base, "wb") as file:
            file.truncate(8 * MIB + DISK_SIZE + 512)
    else:
        base = stores.block("loop", 8 * MIB + DISK_SIZE, sector_size=4096)
        options = {"zero": True}
    device = ubi.add(image, base, stripe_size=STRIPE, **options)
    assert device.size == DISK_SIZE, "whole blocks"
    assert device.status()["block_size"] == 4096
    queue = Path("/sys/block", os.path.basename(device.node), "queue")
    assert (queue / "logical_block_size").read_text() == "4096\n"
    expected = bytearray(image.as_disk(DISK_SIZE))
    assert_content(device.node, expected, "the disk")
    with device.open() as disk:
        with pytest.raises(OSError) as caught:
            disk.pwrite(bytes(512), 512)
        assert caught.value.errno == errno.EINVAL
        disk.pwrite(b"\x5a" * 8192, STRIPE - 4096)
        disk.fsync()
    expected[STRIPE - 4096 : STRIPE + 4096] = b"\x5a" * 8192
    device.reopen(zero=None)
    assert device.status()["block_size"] == 4096
    assert_content(device.node, expected, "the disk, reopened")


def test_blocks_of_512_are_the_default_and_seen_by_its_users(ubi, make_image, make_base):
    device = ubi.add(make_image(1 * MIB), make_base(0))
    queue = Path("/sys/block", os.path.basename(device.node), "queue")
    assert (queue / "logical_block_size").read_text() == "512\n"
    assert (queue / "physical_block_size").read_text() == "4096\n"
    assert (queue / "optimal_io_size").read_text() == f"{1 * MIB}\n"
    assert (queue / "write_cache").read_text() == "write back\n"
    assert (queue / "fua").read_text() == "1\n"


@pytest.mark.data_paths("zero-copy", "copy")
def test_a_copy_of_image_or_base_does_not_change_the_blocks(ubi, make_image, make_base):
    """On XFS `cp` makes files share blocks, and want writes of whole blocks from then on."""
    image = make_image(2 * MIB, on="xfs")
    base = make_base(0, on="xfs")
    device = ubi.add(image, base, stripe_size=STRIPE)
    expected = bytearray(image.content)
    assert_content(device.node, expected, "the disk")
    device.stop()
    for path in (image.path, base):
        run("cp", "--reflink=always", path, f"{path}.copy")
    device.start()
    status = device.status()
    assert status["block_size"] == 512
    assert status["image_direct"]
    assert status["base_direct"]
    with device.open() as disk:
        for offset in (512, STRIPE - 512, 5 * STRIPE + 1024):
            disk.pwrite(b"\x3c" * 1024, offset)
            expected[offset : offset + 1024] = b"\x3c" * 1024
        disk.fsync()
    assert_content(device.node, expected, "the disk, written")
    device.reopen()
    assert_content(device.node, expected, "the disk, reopened")
    image.assert_untouched()


@pytest.mark.data_paths("zero-copy", "copy")
def test_an_image_through_the_page_cache(ubi, make_image, make_base):
    image = make_image(3 * MIB + 100)
    device = ubi.add(image, make_base(0), image_cache="page", stripe_size=STRIPE)
    assert device.status()["image_direct"] is False
    assert_content(device.node, image.as_disk(device.size), "the disk")


@pytest.mark.parametrize(("size", "expected"), [
    (None, 4 * MIB), ("5G", 5 << 30), (9 * MIB + 512, 9 * MIB + 512),
])
def test_size(ubi, make_image, make_base, size, expected):
    image = make_image(3 * MIB + 5)
    base = make_base(0)
    device = ubi.add(image, base, size=size, stripe_size="1M")
    assert device.size == expected
    sectors = Path("/sys/block", os.path.basename(device.node), "size").read_text()
    assert int(sectors) * 512 == expected
    assert os.stat(base).st_size == 8 * MIB + expected
    assert os.stat(base).st_blocks * 512 < 16 * MIB, "a new base is sparse"
    assert_same(
        read_direct(device.node, 0, 4 * MIB), image.as_disk(4 * MIB), 0, "the disk's start",
    )
    assert not any(read_direct(device.node, expected - 512, 512))
    if size == "5G":
        with device.open() as disk:
            disk.pwrite(b"\1" * 512, expected - 512)
        device.reopen()
        assert read_direct(device.node, expected - 512, 512) == b"\1" * 512
