"""Random operations from many threads against a model in memory, then the same disk reopened."""

from __future__ import annotations

import os
import random
import threading

import pytest
from support import ondisk
from support.direct import SECTOR, assert_content
from support.model import Model
from support.stores import BLOCK_DEVICES

MIB = 1 << 20
# Few enough stripes to be met cold and hot, and enough for every round to find cold ones.
IMAGE_SIZES = {64 << 10: 12 * MIB, 256 << 10: 24 * MIB, 1 << 20: 28 * MIB}
PLACES = {64 << 10: ("ext4", "ext4"), 256 << 10: ("xfs", "ubd"), 1 << 20: ("tmpfs", "xfs")}
SHORT = 12_345                     # the image ends inside a sector of its last stripe
TAIL = 2 * MIB                     # of the disk, behind the image
THREADS = 16
ROUNDS = 6
OPERATIONS = int(os.environ.get("UBLK_UBI_OPERATIONS", "1700"))


@pytest.mark.parametrize("copy_on_read", [True, False], ids=["copy", "no-copy"])
@pytest.mark.parametrize("stripe", [64 << 10, 256 << 10, 1 << 20], ids=["64K", "256K", "1M"])
@pytest.mark.parametrize("queues", [1, 2])
def test_random_operations(ubi, make_image, make_base, seed, queues, stripe, copy_on_read):
    size = IMAGE_SIZES[stripe] + TAIL
    image_on, base_on = PLACES[stripe]
    image = make_image(IMAGE_SIZES[stripe] - SHORT, on=image_on, holes=0.2)
    base = make_base(size, on=base_on)
    device = ubi.add(
        image, base, stripe_size=stripe, queues=queues, copy_on_read=copy_on_read,
        **({"zero": True} if base_on in BLOCK_DEVICES else {"size": size}),
    )
    model = Model(device.node, image.content, size, stripe, seed)
    model.run(operations=OPERATIONS, threads=THREADS, rounds=ROUNDS)
    status = device.status()
    print(model.counts, status["cold_reads"], status["hydration"], status["commit"])

    counts = model.counts
    assert counts.total >= OPERATIONS
    assert min(counts.reads, counts.writes, counts.durable_writes, counts.flushes) > 0
    assert status["cold_reads"] > 0
    assert status["hydration"]["whole_stripe_writes"] > 0
    assert status["hydration"]["stripes"] > 0
    assert [status["io"][op]["errors"] for op in ("read", "write", "flush")] == [0, 0, 0]

    model.check("the disk after the run")
    device.stop()
    metadata = ondisk.read_metadata(base)
    device.start(zero=None)
    model.check("the disk, reopened")
    if not copy_on_read:
        assert device.stripes()["hydrated"] == len(metadata.hydrated)
    image.assert_untouched()


@pytest.mark.parametrize("queues", [1, 2])
def test_readers_beside_writers(ubi, make_image, make_base, seed, queues):
    """What is read while it is written for the first time is old or new, never anything else."""
    stripe, stripes, readers = 64 << 10, 160, 5
    image = make_image(stripes * stripe)
    device = ubi.add(image, make_base(0), stripe_size=stripe, queues=queues)
    rng = random.Random(seed)
    order = rng.sample(range(stripes), stripes)
    # Whole stripes and parts, in one request each.
    writes = {
        number: (number * stripe, stripe) if rng.random() < 0.6 else
        (number * stripe + rng.randrange(64) * SECTOR, rng.randint(1, 64) * SECTOR)
        for number in order
    }
    new = bytearray(image.content)
    for number, (offset, length) in writes.items():
        new[offset : offset + length] = bytes([number + 1]) * length
    position, failures, ended = [0, 0], [], threading.Event()

    def write(half: int) -> None:
        with device.open() as disk:
            for index in range(half, stripes, 2):
                position[half] = order[index]
                offset, length = writes[order[index]]
                disk.pwrite(bytes(new[offset : offset + length]), offset)

    def read(number: int) -> None:
        with device.open(os.O_RDONLY) as disk:
            while not ended.is_set():
                offset = position[number % 2] * stripe
                found = disk.pread(offset, stripe)
                failures.extend(strangers(found, image.content, new, offset))

    tasks = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    writers = [threading.Thread(target=write, args=(half,)) for half in range(2)]
    for thread in (*tasks, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    for thread in tasks:
        thread.join()
    assert not failures, failures[:5]
    assert_content(device.node, new, "the disk")


def strangers(found: bytes, old: bytes, new: bytes, offset: int) -> list[str]:
    """Name the sectors with a byte that is neither old nor new."""
    rows = []
    for at in range(0, len(found), SECTOR):
        sector = found[at : at + SECTOR]
        was = old[offset + at : offset + at + SECTOR]
        is_now = new[offset + at : offset + at + SECTOR]
        if sector not in (was, is_now) and any(
            byte not in pair for byte, *pair in zip(sector, was, is_now, strict=True)
        ):
            rows.append(f"byte {offset + at}: {sector[:16].hex()}")
    return rows
