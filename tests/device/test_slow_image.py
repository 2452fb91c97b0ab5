"""A slow image holds up what needs it, and nothing else."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.guest import BLOCK, flush, read, write
from support.mapper import delayed_reads
from support.served import serve
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.served import ServedDisk
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
IMAGE_SIZE = 16 * MIB
FAST_STRIPES = IMAGE_SIZE // STRIPE // 2   # the slow ones come behind


@pytest.fixture
def served_image(undo: Undo, seed: int) -> ServedDisk:
    return serve(undo, IMAGE_SIZE, seed=seed)


@pytest.fixture
def slow(
    ubi: Ubi, served_image: ServedDisk, make_base: Callable[..., str],
    request: pytest.FixtureRequest,
) -> Iterator[Device]:
    """A device with stripe 0 hot, whose image keeps back what is asked of its second half."""
    options = getattr(request, "param", {})
    base = make_base(IMAGE_SIZE)
    device = ubi.add(served_image.path, base, size=IMAGE_SIZE, stripe_size=STRIPE, **options)
    write(device, 0, b"h" * BLOCK)
    served_image.hold(lambda asked: asked.offset >= FAST_STRIPES * STRIPE)
    yield device
    served_image.release()


def slow_stripe(number: int) -> int:
    return (FAST_STRIPES + number) * STRIPE


@pytest.mark.data_paths("zero-copy", "copy")
def test_hot_io_completes_while_a_cold_read_is_delayed(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
) -> None:
    image = make_image(4 * MIB, on="loop")
    slow = mapper.map(image.path)
    device = ubi.add(slow.path, make_base(4 * MIB), size=4 * MIB, stripe_size=STRIPE)
    write(device, 0, b"h" * BLOCK)
    slow.delay(read_ms=60_000)

    cold = Background(lambda: read(device, 2 * MIB))
    until(lambda: delayed_reads(slow) > 0, "the cold read is under way")
    hot = Background(lambda: (read(device, 0), write(device, BLOCK, b"i" * BLOCK), flush(device)))
    assert hot.result()[0] == b"h" * BLOCK
    assert not cold.done, "the cold read was to take a minute"
    slow.linear()
    assert cold.result() == image.content[2 * MIB : 2 * MIB + BLOCK]


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("slow", [
    pytest.param({"queues": 1}, id="1q"),
    pytest.param({"queues": 2}, id="2q", marks=pytest.mark.cpus(2)),
], indirect=True)
def test_only_those_wait_that_need_what_is_held(slow: Device, served_image: ServedDisk) -> None:
    image = bytes(served_image.content)
    cold_read = Background(lambda: read(slow, slow_stripe(0)))
    cold_write = Background(lambda: write(slow, slow_stripe(1), b"c" * BLOCK))
    served_image.wait_for_held(2)

    # Hot, both ways.
    assert read(slow, 0) == b"h" * BLOCK
    write(slow, 2 * BLOCK, b"i" * BLOCK)
    # Cold, and the image answers: a read, a part of a stripe, a whole stripe.
    assert read(slow, 2 * STRIPE) == image[2 * STRIPE : 2 * STRIPE + BLOCK]
    write(slow, 3 * STRIPE + BLOCK, b"p" * BLOCK)
    assert read(slow, 3 * STRIPE) == image[3 * STRIPE : 3 * STRIPE + BLOCK]
    # Cold, and the image is not needed.
    write(slow, slow_stripe(2), b"w" * STRIPE)
    assert read(slow, slow_stripe(2), STRIPE) == b"w" * STRIPE
    flush(slow)
    write(slow, 4 * STRIPE, b"q" * BLOCK)
    flush(slow)

    status = slow.status()
    assert (status["state"], status["degraded"]) == ("live", None)

    assert not cold_read.done
    assert not cold_write.done
    served_image.release()
    assert cold_read.result() == image[slow_stripe(0) : slow_stripe(0) + BLOCK]
    cold_write.result()
    assert read(slow, slow_stripe(1), STRIPE) == (
        b"c" * BLOCK + image[slow_stripe(1) + BLOCK : slow_stripe(2)]
    )


@pytest.mark.data_paths("zero-copy", "copy")
def test_a_held_stripe_is_waited_for_by_its_own_io_alone(
    slow: Device, served_image: ServedDisk,
) -> None:
    """Read, overwrite in part and as a whole: all of one stripe that is being fetched."""
    image = bytes(served_image.content)
    first = Background(lambda: write(slow, slow_stripe(0), b"1" * BLOCK))
    served_image.wait_for_held()
    second = Background(lambda: write(slow, slow_stripe(0) + BLOCK, b"2" * BLOCK))
    reader = Background(lambda: read(slow, slow_stripe(0) + 2 * BLOCK))
    served_image.wait_for_held(2)
    write(slow, slow_stripe(1), b"n" * STRIPE)
    flush(slow)
    assert not any(waiting.done for waiting in (first, second, reader))
    served_image.release()
    first.result()
    second.result()
    assert reader.result() == image[slow_stripe(0) + 2 * BLOCK : slow_stripe(0) + 3 * BLOCK]
    assert read(slow, slow_stripe(0), 3 * BLOCK) == (
        b"1" * BLOCK + b"2" * BLOCK + image[slow_stripe(0) + 2 * BLOCK : slow_stripe(0) + 3 * BLOCK]
    )


def test_copy_on_read_of_a_held_image_leaves_room_for_those_that_wait(
    slow: Device, served_image: ServedDisk,
) -> None:
    """More cold reads than there are stripe buffers: a write that needs one still gets it."""
    image = bytes(served_image.content)
    starts = [slow_stripe(2 * number) for number in range(48)]
    readers = [Background(functools.partial(read, slow, start)) for start in starts]
    # The reads themselves, and as many fetches as copy-on-read may have.
    served_image.wait_for_held(48 + 16)
    write(slow, 5 * STRIPE, b"p" * BLOCK)
    assert read(slow, 5 * STRIPE + BLOCK) == image[5 * STRIPE + BLOCK : 5 * STRIPE + 2 * BLOCK]
    flush(slow)
    assert not any(reader.done for reader in readers)
    served_image.release()
    for start, reader in zip(starts, readers, strict=True):
        assert reader.result() == image[start : start + BLOCK]
