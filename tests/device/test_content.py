"""A device shows its image, wherever the image ends, and hydrates what it should and no more."""

from __future__ import annotations

import pytest
from support import ondisk
from support.direct import assert_content, assert_same, read_direct
from support.shell import until

KIB, MIB = 1 << 10, 1 << 20
DATA_OFFSET = 8 * MIB

# image size, stripe size, disk size (None: what `add` makes of it), where the image is
SHAPES = {
    "whole": (5 * MIB, 64 * KIB, None, "ext4"),
    "a part of a stripe at the end": (3 * MIB + 512, 1 * MIB, None, "ext4"),
    "a part of a sector at the end": (2 * MIB + 64 * KIB + 4097, 256 * KIB, None, "ext4"),
    "one byte in the last stripe": (192 * KIB + 1, 64 * KIB, None, "xfs"),
    "one byte short of whole": (4 * MIB - 1, 1 * MIB, None, "hostfs"),
    "one stripe": (64 * KIB, 64 * KIB, None, "ext4"),
    "one byte": (1, 1 * MIB, None, "ext4"),
    "a larger base": (3 * MIB + 12_345, 128 * KIB, 11 * MIB + 512, "ext4"),
    "a block device": (4 * MIB, 512 * KIB, None, "ram"),
    "a block device of odd size": (3 * MIB + 512, 256 * KIB, 8 * MIB, "ubd"),
}


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("shape", SHAPES)
def test_reads(ubi, make_image, make_base, shape):
    """A disk that only reads its image, then, opened again, one that hydrates what is read."""
    image_size, stripe, size, on = SHAPES[shape]
    stripes = -(-image_size // stripe)
    image = make_image(image_size, on=on, holes=0.3)
    base = make_base(0)
    device = ubi.add(image, base, size=size, stripe_size=stripe, copy_on_read=False)
    assert device.size == (size or stripes * stripe)
    expected = image.as_disk(device.size)

    # The last stripe, if the image ends inside it, is on the base before the disk is there.
    last = image_size // stripe
    first_hydrated = {last} if image_size % stripe else set()
    assert ondisk.read_metadata(base).hydrated == first_hydrated
    for what in ("the disk", "the disk, read again"):
        assert_content(device.node, expected, what)
    status = device.status()
    assert status["stripes"]["hydrated"] == status["stripes"]["committed"] == len(first_hydrated)
    assert status["hydration"]["stripes"] == len(first_hydrated)
    assert (status["cold_reads"] > 0) == (last > 0)
    device.stop()
    assert ondisk.read_metadata(base).hydrated == first_hydrated
    assert not any(read_direct(base, DATA_OFFSET, device.size)[: last * stripe])

    device.start(copy_on_read=True)
    assert_content(device.node, expected, "the disk while it hydrates")
    until(lambda: device.stripes()["hydrated"] == stripes, "every stripe is hydrated")
    device.wait_until_committed()
    status = device.status()
    assert status["stripes"] == {"total": stripes, "hydrated": stripes, "committed": stripes}
    assert status["hydration"]["stripes"] == stripes - len(first_hydrated)
    assert status["hydration"]["bytes"] == stripe * status["hydration"]["stripes"]
    cold_reads = status["cold_reads"]
    assert_content(device.node, expected, "the disk, hydrated")
    assert device.status()["cold_reads"] == cold_reads
    device.stop()
    assert ondisk.read_metadata(base).hydrated == set(range(stripes))
    assert_same(read_direct(base, DATA_OFFSET, device.size), expected, 0, "the base's data")
    image.assert_untouched()


@pytest.mark.data_paths("zero-copy", "copy", "fallback")
def test_a_whole_stripe_is_written_without_a_fetch(ubi, make_image, make_base, seed):
    stripe = 64 * KIB
    image = make_image(16 * stripe)
    base = make_base(0)
    device = ubi.add(image, base, stripe_size=stripe, copy_on_read=False)
    expected = bytearray(image.content)
    with device.open() as disk:
        for offset, length in ((0, stripe), (3 * stripe, 4 * stripe), (15 * stripe, stripe)):
            data = bytes([offset // stripe + 1]) * length
            disk.pwrite(data, offset)
            expected[offset : offset + length] = data
    written = {0, 3, 4, 5, 6, 15}
    status = device.status()
    assert status["stripes"]["hydrated"] == len(written)
    assert status["hydration"]["whole_stripe_writes"] == len(written)
    assert status["hydration"]["stripes"] == 0, "nothing was fetched"
    assert_content(device.node, expected, "the disk")

    device.stop()
    assert ondisk.read_metadata(base).hydrated == written
    device.start()
    assert_content(device.node, expected, "the disk, reopened")
    image.assert_untouched()


@pytest.mark.data_paths("zero-copy", "copy", "fallback")
@pytest.mark.parametrize("copy_on_read", [True, False])
def test_a_part_of_a_stripe_is_written_into_what_was_fetched(
    ubi, make_image, make_base, copy_on_read,
):
    stripe = 256 * KIB
    image = make_image(12 * stripe + 999)
    base = make_base(0)
    device = ubi.add(image, base, stripe_size=stripe, copy_on_read=copy_on_read)
    expected = bytearray(image.as_disk(device.size))
    writes = (
        (512, 512),                              # inside a stripe
        (3 * stripe - 512, 1024),                # across a border
        (5 * stripe + 512, 2 * stripe),          # a part, a whole one, a part
        (9 * stripe, stripe - 512),              # all but the last sector
        (10 * stripe + 512, stripe - 512),       # all but the first
        (12 * stripe + 512, 1024),               # where the image ends, and behind it
    )
    with device.open() as disk:
        for number, (offset, length) in enumerate(writes):
            data = bytes([number + 1]) * length
            disk.pwrite(data, offset)
            expected[offset : offset + length] = data
    written = {0, 2, 3, 5, 6, 7, 9, 10, 12}
    status = device.status()
    assert status["stripes"]["hydrated"] == len(written)
    assert status["hydration"]["whole_stripe_writes"] == 1
    assert status["hydration"]["stripes"] == len(written) - 1

    device.stop()
    assert ondisk.read_metadata(base).hydrated == written
    device.start()
    assert_content(device.node, expected, "the disk, reopened")
    image.assert_untouched()


@pytest.mark.data_paths("zero-copy", "copy")
def test_behind_the_image_there_is_nothing_to_hydrate(ubi, make_image, make_base):
    stripe = 64 * KIB
    image = make_image(2 * stripe)
    base = make_base(0)
    device = ubi.add(image, base, stripe_size=stripe, size=8 * stripe, copy_on_read=False)
    expected = bytearray(image.as_disk(device.size))
    with device.open() as disk:
        for offset, data in ((3 * stripe + 512, b"a" * 512), (4 * stripe, b"b" * stripe),
                             (device.size - 512, b"c" * 512)):
            disk.pwrite(data, offset)
            expected[offset : offset + len(data)] = data
        disk.fsync()
    status = device.status()
    assert status["stripes"] == {"total": 2, "hydrated": 0, "committed": 0}
    assert status["commit"]["rounds"] == 0
    assert_content(device.node, expected, "the disk")
    device.reopen()
    assert_content(device.node, expected, "the disk, reopened")


def test_what_the_base_says_of_itself(ubi, make_image, make_base):
    image = make_image(3 * MIB + 1)
    base = make_base(0)
    device = ubi.add(image, base, stripe_size=512 * KIB)
    status = device.status()
    for generation in (1, 2):
        metadata = ondisk.read_metadata(base)
        extension = metadata.extension
        assert (metadata.minor, extension.is_open) == (2, True)
        assert extension.uuid.hex() == status["uuid"].replace("-", "")
        assert (extension.stripe_bytes, extension.image_bytes) == (512 * KIB, image.size)
        assert extension.generation == device.status()["generation"] == generation
        device.stop()
        metadata = ondisk.read_metadata(base)
        assert (metadata.minor, metadata.extension.is_open) == (1, False)
        assert metadata.extension.uuid == extension.uuid
        device.start()
