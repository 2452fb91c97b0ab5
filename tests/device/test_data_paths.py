"""Which way data goes between a guest and the files: what is asked for, what the kernel grants."""

from __future__ import annotations

import functools
import mmap
import os
from typing import TYPE_CHECKING, Any

import pytest
from support.background import Background
from support.direct import assert_content
from support.guest import flush, read, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
THREADS = 16


def transfers(status: dict[str, Any]) -> int:
    count: int = status["io"]["read"]["count"] + status["io"]["write"]["count"]
    return count


def load(device: Device, image: Image) -> bytearray:
    """Cold and hot reads, parts and whole stripes; returns what the disk holds then."""
    expected = bytearray(image.content)

    def use(number: int) -> None:
        start = number * 4 * STRIPE
        for at, length in ((512, 512), (STRIPE, STRIPE), (2 * STRIPE - 4096, 8192)):
            data = bytes([number + at % 200 + 1]) * length
            write(device, start + at, data)
            expected[start + at : start + at + length] = data
            assert read(device, start + at, length) == data
        at = start + 3 * STRIPE + 512
        assert read(device, at, 8192) == image.content[at : at + 8192]

    for using in [Background(functools.partial(use, number)) for number in range(THREADS)]:
        using.result()
    flush(device)
    return expected


def test_a_stripe_in_scattered_memory_is_written_whole(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """256 pages that are no neighbours are one request, not two: nothing is hydrated for it."""
    device = ubi.add(make_image(4 * MIB), make_base(4 * MIB), stripe_size=MIB)
    with mmap.mmap(-1, 2 * MIB) as memory, device.open() as disk, memoryview(memory) as view:
        pages = [view[at : at + 4096] for at in range(0, 2 * MIB, 8192)]
        for number, page in enumerate(pages):
            page[:] = bytes([number % 251 + 1]) * 4096
        assert os.pwritev(disk.fd, pages, MIB) == MIB
        expected = b"".join(pages)
        for page in pages:
            page.release()
    assert read(device, MIB, MIB) == expected
    hydration = device.status()["hydration"]
    assert (hydration["whole_stripe_writes"], hydration["stripes"]) == (1, 0)


@pytest.mark.data_paths("zero-copy", "copy", "fallback")
@pytest.mark.cpus(2)
def test_each_path(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], data_path: str,
) -> None:
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, queues=2)
    expected = load(device, image)
    assert_content(device.node, expected, "the disk")
    status = device.status()
    assert status["data_path"] == ("copy" if data_path == "copy" else "zero-copy")
    assert status["fallbacks"] == (transfers(status) if data_path == "fallback" else 0)
    device.reopen()
    assert_content(device.node, expected, "the disk, reopened")


def test_auto_is_zero_copy_where_the_kernel_has_it(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(SIZE), make_base(SIZE))
    assert device.status()["data_path"] == "zero-copy"


def test_some_requests_fall_back_and_others_do_not(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
    few_slots: Callable[[int], dict[str, str]],
) -> None:
    """The way is found anew for each request of a tag."""
    image = make_image(SIZE)
    device = ubi.new(image, make_base(SIZE), stripe_size=STRIPE, depth=8)
    device.environment = few_slots(4)
    device.start()
    expected = load(device, image)
    assert_content(device.node, expected, "the disk")
    status = device.status()
    assert 0 < status["fallbacks"] < transfers(status)
    device.environment = {}
    device.reopen()
    assert_content(device.node, expected, "the disk, reopened")


@pytest.mark.parametrize("before", ["zero-copy", "copy"])
def test_a_killed_disk_goes_on_the_other_way(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], before: str,
) -> None:
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, data_path=before)
    expected = load(device, image)
    device.kill()
    after = "copy" if before == "zero-copy" else "zero-copy"
    device.start(data_path=after)
    assert device.status()["data_path"] == after
    assert_content(device.node, expected, "the disk")
