"""Disks with blocks of 4096 bytes below: the device's own fit them, or the reason is given."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.direct import assert_content
from support.images import Image, random_content, write_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.stores import Stores

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
TAIL = MIB
BLOCK = 4096
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F


@pytest.fixture
def image4k(stores: Stores, seed: int) -> Image:
    device = stores.block("loop", SIZE, sector_size=BLOCK)
    return write_block(device, random_content(SIZE, seed, holes=0.3))


@pytest.fixture
def base4k(stores: Stores) -> str:
    return stores.block("loop", 8 * MIB + SIZE + TAIL, sector_size=BLOCK)


def logical_block_size(device: Device) -> int:
    queue = Path("/sys/block", os.path.basename(device.node), "queue")
    return int((queue / "logical_block_size").read_text())


def use(device: Device, expected: bytearray) -> None:
    """Each kind of request, of one block and of more, at the borders of stripes and of the disk."""
    def put(at: int, data: bytes) -> None:
        disk.pwrite(data, at)
        expected[at : at + len(data)] = data

    def ask(request: int, at: int, length: int) -> None:
        fcntl.ioctl(disk.fd, request, struct.pack("=QQ", at, length))

    with device.open() as disk:
        put(BLOCK, b"a" * BLOCK)
        put(3 * STRIPE - BLOCK, b"b" * 2 * BLOCK)
        put(5 * STRIPE, b"c" * STRIPE)
        put(device.size - BLOCK, b"d" * BLOCK)
        for at, length in ((8 * STRIPE + BLOCK, BLOCK), (10 * STRIPE - BLOCK, 3 * STRIPE)):
            ask(BLKZEROOUT, at, length)
            expected[at : at + length] = bytes(length)
        # Of what no stripe is on the base: without effect.
        ask(BLKDISCARD, 20 * STRIPE + BLOCK, 4 * STRIPE)
        put(5 * STRIPE, b"e" * STRIPE)
        # … and of some that are, parts of them, up to the disk's last block: zeros, or as before.
        for at, length in ((2 * STRIPE + BLOCK, 3 * STRIPE), (device.size - 2 * BLOCK, 2 * BLOCK)):
            ask(BLKDISCARD, at, length)
            found = disk.pread(at, length)
            for block in range(0, length, BLOCK):
                assert found[block : block + BLOCK] in (
                    bytes(BLOCK), expected[at + block : at + block + BLOCK])
            expected[at : at + length] = found
        disk.fsync()


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("which", ["image", "base", "both"])
def test_they_fit(
    ubi: Ubi, image4k: Image, base4k: str, make_image: Callable[..., Image],
    make_base: Callable[..., str], which: str,
) -> None:
    image = image4k if which != "base" else make_image(SIZE)
    base = base4k if which != "image" else make_base(SIZE)
    device = ubi.add(
        image, base, stripe_size=STRIPE, copy_on_read=False,
        **({"size": SIZE + TAIL} if which == "image" else {"zero": True}),
    )
    assert logical_block_size(device) == device.status()["block_size"] == BLOCK
    expected = bytearray(image.as_disk(device.size))
    assert_content(device.node, expected, "the disk")
    use(device, expected)
    assert_content(device.node, expected, "the disk, written")
    device.hydrate(run=True)
    device.wait_until_independent()
    assert_content(device.node, expected, "the disk, hydrated")
    device.options["image"] = None
    device.stop()
    device.start(zero=None, size=None)
    assert_content(device.node, expected, "the disk, reopened")
    image.assert_untouched()


def test_an_image_that_ends_inside_a_block_is_refused(
    ubi: Ubi, stores: Stores, make_base: Callable[..., str], seed: int,
) -> None:
    """A disk with large blocks over a file of any length: nobody can read what is behind the last.
    With smaller ones it is an image as any other."""
    content = random_content(SIZE + 3 * 512, seed)
    file = stores.folder("ext4") / "image"
    file.write_bytes(content)
    base = make_base(SIZE)
    line = ubi.refused(stores.loop_over(file, "--sector-size", BLOCK), base, code=1)
    assert f"{SIZE + 3 * 512} bytes in blocks of {BLOCK}" in line
    assert "last 1536" in line
    assert not os.path.exists(base)
    image = Image(stores.loop_over(file), content)
    device = ubi.add(image, base, stripe_size=STRIPE)
    assert_content(device.node, image.as_disk(device.size), "the disk")


def test_smaller_blocks_are_refused(
    ubi: Ubi, image4k: Image, base4k: str, make_image: Callable[..., Image],
    make_base: Callable[..., str],
) -> None:
    for image, base in ((image4k, make_base(SIZE)), (make_image(SIZE), base4k)):
        line = ubi.refused(image, base, code=1, block_size=512)
        assert "--block-size 512" in line
        assert "4096" in line
    base = make_base(SIZE)
    device = ubi.add(image4k, base, image_cache="page", block_size=512, stripe_size=STRIPE)
    assert logical_block_size(device) == 512
    expected = bytearray(image4k.content)
    with device.open() as disk:
        disk.pwrite(b"x" * 512, 7 * STRIPE + 512)
    expected[7 * STRIPE + 512 : 7 * STRIPE + 1024] = b"x" * 512
    assert_content(device.node, expected, "the disk")


def test_a_disk_keeps_the_blocks_that_it_was_made_with(
    ubi: Ubi, image4k: Image, make_base: Callable[..., str],
) -> None:
    """A guest's partition table counts in them: they do not shrink when the image is gone."""
    base = make_base(SIZE)
    device = ubi.add(image4k, base, stripe_size=STRIPE)
    device.hydrate(run=True)
    device.wait_until_independent()
    device.options["image"] = None
    device.reopen()
    assert logical_block_size(device) == BLOCK
    assert json.loads(ubi.command("inspect", base, "--json").stdout)["block_size"] == BLOCK


def test_a_disk_moves_to_larger_blocks_when_told(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], base4k: str,
) -> None:
    """Its base is copied to a disk with blocks of 4096 bytes."""
    image = make_image(SIZE)
    base = make_base(SIZE)
    device = ubi.add(image, base, stripe_size=STRIPE, size=SIZE + TAIL)
    expected = bytearray(image.as_disk(device.size))
    with device.open() as disk:
        disk.pwrite(b"x" * 512, 7 * STRIPE + 512)
    expected[7 * STRIPE + 512 : 7 * STRIPE + 1024] = b"x" * 512
    device.stop()
    with open(base, "rb") as source, open(base4k, "r+b") as target:
        target.write(source.read())
        os.fsync(target.fileno())
    line = ubi.refused(image, base4k, code=1)
    assert "blocks of 512 bytes" in line
    assert "--block-size 4096" in line
    moved = ubi.add(image, base4k, block_size=BLOCK)
    assert logical_block_size(moved) == BLOCK
    assert_content(moved.node, expected, "the disk, moved")
