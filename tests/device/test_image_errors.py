"""An image or base that fails a request fails that request alone, and heals with the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.guest import BLOCK, fails, flush, read, write
from support.ondisk import DATA_OFFSET, read_metadata
from support.served import WRITE, serve
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapped, Mapper
    from support.served import Request
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
IMAGE_SIZE = 8 * MIB
BAD = 37 * STRIPE + 3 * BLOCK      # lies in none of the blocks that the fingerprint looks at


def errors(device: Device) -> tuple[int, int, int]:
    """Errors of reads, of writes and of hydration, so far."""
    status = device.status()
    return (
        status["io"]["read"]["errors"], status["io"]["write"]["errors"],
        status["hydration"]["errors"],
    )


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image(IMAGE_SIZE, on="loop")


@pytest.fixture
def below(image: Image, mapper: Mapper) -> Mapped:
    return mapper.map(image.path)


def expected(image: Image, offset: int, length: int = BLOCK) -> bytes:
    return image.content[offset : offset + length]


@pytest.mark.data_paths("zero-copy", "copy")
def test_a_bad_block_of_the_image(
    ubi: Ubi, image: Image, below: Mapped, make_base: Callable[..., str],
) -> None:
    below.table(f"0 {below.sectors} dust {below.below} 0 {BLOCK}")
    device = ubi.add(below.path, make_base(IMAGE_SIZE), size=IMAGE_SIZE, stripe_size=STRIPE)
    below.message("addbadblock", BAD // BLOCK)
    below.message("enable")
    stripe = BAD // STRIPE * STRIPE
    write(device, 0, b"h" * BLOCK)

    assert fails(read, device, BAD)
    assert errors(device)[:2] == (1, 0)
    # The stripe cannot be fetched; what else is in it can be read.
    assert read(device, stripe) == expected(image, stripe)
    assert fails(write, device, stripe, b"p" * BLOCK)
    assert fails(write, device, BAD, b"p" * BLOCK)
    # The others go on, neighbours too.
    assert read(device, 0) == b"h" * BLOCK
    write(device, BLOCK, b"i" * BLOCK)
    write(device, stripe - STRIPE, b"n" * BLOCK)
    assert read(device, stripe + STRIPE) == expected(image, stripe + STRIPE)
    flush(device)
    reads, writes, hydration = errors(device)
    assert (reads, writes) == (1, 2)
    assert hydration >= 2
    assert device.status()["degraded"] is None
    assert 37 not in read_metadata(device.options["base"]).hydrated

    below.message("removebadblock", BAD // BLOCK)
    assert read(device, BAD) == expected(image, BAD)
    write(device, stripe, b"p" * BLOCK)
    assert read(device, stripe, STRIPE) == (
        b"p" * BLOCK + expected(image, stripe + BLOCK, STRIPE - BLOCK)
    )
    flush(device)
    assert 37 in read_metadata(device.options["base"]).hydrated
    assert errors(device)[:2] == (1, 2)


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.cpus(2)
def test_a_dead_image_and_its_return(
    ubi: Ubi, image: Image, below: Mapped, make_base: Callable[..., str],
) -> None:
    device = ubi.add(
        below.path, make_base(IMAGE_SIZE), size=IMAGE_SIZE, stripe_size=STRIPE, queues=2,
    )
    write(device, 0, b"h" * BLOCK)
    below.error()

    assert fails(read, device, STRIPE)
    assert fails(write, device, STRIPE, b"p" * BLOCK)
    # A whole stripe needs no image, hot ones neither.
    write(device, 2 * STRIPE, b"w" * STRIPE)
    assert read(device, 2 * STRIPE, STRIPE) == b"w" * STRIPE
    assert read(device, 0) == b"h" * BLOCK
    write(device, BLOCK, b"i" * BLOCK)
    flush(device)
    assert device.status()["degraded"] is None

    below.linear()
    assert read(device, STRIPE) == expected(image, STRIPE)
    write(device, STRIPE, b"p" * BLOCK)
    device.reopen()
    assert read(device, 0, 3 * STRIPE) == (
        b"h" * BLOCK + b"i" * BLOCK + expected(image, 2 * BLOCK, STRIPE - 2 * BLOCK)
        + b"p" * BLOCK + expected(image, STRIPE + BLOCK, STRIPE - BLOCK)
        + b"w" * STRIPE
    )


@pytest.mark.data_paths("zero-copy", "copy")
def test_a_bad_part_of_the_base(
    ubi: Ubi, make_image: Callable[..., Image], mapper: Mapper, make_base: Callable[..., str],
) -> None:
    image = make_image(IMAGE_SIZE)
    base = mapper.map(make_base(IMAGE_SIZE, on="loop"))
    device = ubi.add(image, base.path, stripe_size=STRIPE)
    write(device, 3 * STRIPE, b"h" * BLOCK)
    flush(device)
    # Stripes 3, 4 and 5.
    base.error(DATA_OFFSET + 3 * STRIPE, 3 * STRIPE)

    assert fails(write, device, 4 * STRIPE + BLOCK, b"p" * BLOCK)
    assert fails(write, device, 5 * STRIPE, b"w" * STRIPE)
    assert fails(write, device, 3 * STRIPE, b"i" * BLOCK)
    assert fails(read, device, 3 * STRIPE)
    # Nothing was made of the failed ones: the image has them still.
    assert read(device, 4 * STRIPE) == expected(image, 4 * STRIPE)
    assert read(device, 5 * STRIPE) == expected(image, 5 * STRIPE)
    write(device, 6 * STRIPE, b"n" * BLOCK)
    flush(device)
    status = device.status()
    assert (status["degraded"], status["io"]["write"]["errors"]) == (None, 3)
    assert read_metadata(base.path).hydrated == {3, 6}

    base.linear()
    assert read(device, 3 * STRIPE) == b"h" * BLOCK
    write(device, 4 * STRIPE + BLOCK, b"p" * BLOCK)
    write(device, 5 * STRIPE, b"w" * STRIPE)
    flush(device)
    assert read_metadata(base.path).hydrated == {3, 4, 5, 6}
    device.reopen()
    assert read(device, 4 * STRIPE, 2 * STRIPE) == (
        expected(image, 4 * STRIPE) + b"p" * BLOCK
        + expected(image, 4 * STRIPE + 2 * BLOCK, STRIPE - 2 * BLOCK) + b"w" * STRIPE
    )


def test_a_header_page_that_cannot_be_written(ubi: Ubi, undo: Undo, seed: int) -> None:
    """The flush that needs it fails and the next one tries again: no fdatasync has failed."""
    image, base = serve(undo, IMAGE_SIZE, seed=seed), serve(undo, DATA_OFFSET + IMAGE_SIZE)
    device = ubi.add(image.path, base.path, stripe_size=STRIPE)
    write(device, 0, b"a" * BLOCK)
    flush(device)
    committed = base.metadata

    base.fail(lambda request: request.is_metadata_write)
    write(device, STRIPE, b"b" * BLOCK)
    assert fails(flush, device)
    assert fails(write, device, STRIPE, b"c" * BLOCK, fua=True)
    write(device, STRIPE, b"d" * BLOCK)
    assert base.metadata == committed
    status = device.status()
    assert (status["degraded"], status["stripes"]["committed"]) == (None, 1)
    assert status["commit"]["errors"] >= 2

    base.heal()
    flush(device)
    assert read_metadata(base.path).hydrated == {0, 1}
    device.stop()
    assert base.at(DATA_OFFSET + STRIPE, BLOCK) == b"d" * BLOCK
    assert not read_metadata(base.path).extension.is_open


def test_fetches_that_fail_again_and_again_use_nothing_up(
    ubi: Ubi, undo: Undo, make_base: Callable[..., str], seed: int,
) -> None:
    """Every stripe buffer is free again, whatever part of a fetch has failed."""
    image, base = serve(undo, IMAGE_SIZE, seed=seed), serve(undo, DATA_OFFSET + IMAGE_SIZE)
    device = ubi.add(image.path, base.path, stripe_size=STRIPE)

    def half(request: Request) -> bool:
        return request.handle % 2 == 0 and (request.kind != WRITE or request.offset >= DATA_OFFSET)

    image.fail(half)
    base.fail(lambda request: request.kind == WRITE and half(request))
    failed = sum(
        fails(write, device, stripe * STRIPE, bytes([stripe]) * BLOCK)
        for _ in range(4) for stripe in range(40)
    )
    assert failed >= 40, "more than there are buffers"
    image.heal()
    base.heal()
    for stripe in range(40):
        write(device, stripe * STRIPE, bytes([stripe + 1]) * BLOCK)
    until(lambda: device.stripes()["committed"] >= 40, "all is committed")
    for stripe in range(40):
        at = DATA_OFFSET + stripe * STRIPE
        assert base.at(at, STRIPE) == (
            bytes([stripe + 1]) * BLOCK + image.at(stripe * STRIPE + BLOCK, STRIPE - BLOCK)
        )


@pytest.mark.parametrize("change", ["written", "shorter"])
def test_an_image_that_changes_degrades_its_disk(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], change: str,
) -> None:
    """What was copied of it and what is read of it from now on may not go together."""
    image = make_image(IMAGE_SIZE)
    device = ubi.add(image, make_base(IMAGE_SIZE), size=IMAGE_SIZE, stripe_size=STRIPE)
    write(device, 0, b"h" * BLOCK)
    assert ubi.command("status", device.name).code == 0
    with open(image.path, "r+b") as file:
        if change == "written":
            file.write(b"x")
        else:
            file.truncate(IMAGE_SIZE - STRIPE)
    until(lambda: ubi.command("status", device.name).code == 3, "it is noticed")
    assert image.path in ubi.command("status", device.name, "--json").json()["degraded"]
    # What is on the base is as sound as before.
    assert read(device, 0) == b"h" * BLOCK
    if change == "shorter":
        assert fails(read, device, IMAGE_SIZE - BLOCK)
    flush(device)
    device.stop()
