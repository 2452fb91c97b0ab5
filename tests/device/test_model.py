"""Random operations from many threads against a model in memory, then the same disk reopened."""

from __future__ import annotations

import itertools
import os
import random
import threading
from typing import NamedTuple

import pytest
from support import ondisk
from support.direct import SECTOR, assert_content
from support.model import Model
from support.stores import BLOCK_DEVICES

MIB = 1 << 20
# Few enough stripes to be met cold and hot, and enough for every round to find cold ones.
IMAGE_SIZES = {64 << 10: 10 * MIB, 256 << 10: 16 * MIB, 1 << 20: 22 * MIB}
IMAGE_PLACES = ("ext4", "tmpfs", "loop", "xfs")
BASE_PLACES = {"file": ("ext4", "xfs", "tmpfs"), "block": ("ubd", "ram", "dm", "loop")}
CACHES = ("writeback", "writethrough", "unsafe")
SHORT = 12_345                     # the image ends inside a sector of its last stripe
TAIL = 2 * MIB                     # of the disk, behind the image
THREADS = 16
ROUNDS = 6
# In all; and of one disk before there is a new one, cold again.
OPERATIONS = int(os.environ.get("UBLK_UBI_OPERATIONS", "100000"))
MOST_OF_A_DISK = 10_000
RATE = 2 * MIB                     # of hydration that is to go on beside the operations


class Way(NamedTuple):
    """What a disk is made of; what is not multiplied out goes round."""

    data_path: str
    queues: int
    cache: str
    hydrate: bool
    base: str
    stripe: int
    copy_on_read: bool
    image_on: str
    base_on: str

    def __str__(self) -> str:
        hydrate = "hydrate" if self.hydrate else "demand"
        return f"{self.data_path}-{self.queues}q-{self.cache}-{hydrate}-{self.base}"


def ways() -> list[Way]:
    """Every data path × queues × cache mode × hydration × kind of base."""
    factors = (("zero-copy", "copy"), (1, 2), CACHES, (False, True), ("file", "block"))
    rng = random.Random(3)
    return [
        Way(
            *chosen,
            stripe=rng.choice(list(IMAGE_SIZES)),
            copy_on_read=rng.random() < 0.5,
            image_on=rng.choice(IMAGE_PLACES),
            base_on=rng.choice(BASE_PLACES[chosen[-1]]),
        )
        for chosen in itertools.product(*factors)
    ]


WAYS = ways()
SHARE = -(-OPERATIONS // len(WAYS))
# The usual limit is enough, and says how tests are shared out among guests, for what CI does.
more_time = pytest.mark.limit(60 + SHARE / 25) if SHARE > 3000 else lambda test: test


@more_time
@pytest.mark.parametrize("way", [
    pytest.param(way, id=str(way), marks=pytest.mark.cpus(way.queues)) for way in WAYS
])
def test_random_operations(ubi, make_image, make_base, seed, way):
    left = SHARE
    for turn in range(-(-SHARE // MOST_OF_A_DISK)):
        run_disk(ubi, make_image, make_base, seed + turn, way, min(left, MOST_OF_A_DISK))
        left -= MOST_OF_A_DISK


@pytest.mark.cpus(2)
@pytest.mark.data_paths("fallback")
def test_random_operations_that_fall_back(ubi, make_image, make_base, seed):
    way = WAYS[0]._replace(queues=2, hydrate=True)
    status = run_disk(ubi, make_image, make_base, seed, way, 2000)
    transfers = status["io"]["read"]["count"] + status["io"]["write"]["count"]
    assert status["fallbacks"] == transfers


def run_disk(ubi, make_image, make_base, seed, way, operations):
    """Random operations on a new disk; then it is opened again, without its image if it may be."""
    image_size = IMAGE_SIZES[way.stripe]
    size = image_size + TAIL
    image = make_image(image_size - (0 if way.image_on == "loop" else SHORT), on=way.image_on,
                       holes=0.2)
    base = make_base(size, on=way.base_on)
    device = ubi.add(
        image, base, stripe_size=way.stripe, queues=way.queues, copy_on_read=way.copy_on_read,
        data_path=way.data_path, cache=way.cache, hydrate=way.hydrate,
        rate=RATE if way.hydrate else None,
        **({"zero": True} if way.base_on in BLOCK_DEVICES else {"size": size}),
    )
    model = Model(device.node, image.content, size, way.stripe, seed)
    model.run(operations=operations, threads=THREADS, rounds=ROUNDS)
    status = device.status()
    print(way, model.counts, status["cold_reads"], status["hydration"], status["commit"])
    assert (status["data_path"], status["cache"]) == (way.data_path, way.cache)
    assert model.counts.total >= operations
    assert min(vars(model.counts).values()) > 0, model.counts
    assert status["hydration"]["stripes"] > 0
    if not way.hydrate:
        assert status["cold_reads"] > 0
        # Of scattered memory a request takes 512 KiB at most.
        assert way.stripe == 1 << 20 or status["hydration"]["whole_stripe_writes"] > 0
    for kind, counts in status["io"].items():
        assert counts["errors"] == 0, kind
        # In writethrough the kernel has no flush to send.
        assert counts["count"] > 0 or (kind, way.cache) == ("flush", "writethrough")

    if way.hydrate:
        device.hydrate(rate="max")
        device.wait_until_independent()
    model.check("the disk after the run")
    image.assert_untouched()
    device.stop()
    metadata = ondisk.read_metadata(base)
    if way.hydrate:
        assert metadata.hydrated == set(range(metadata.stripes))
        device.options["image"] = None
    device.start(zero=None, hydrate=None, rate=None)
    model.check("the disk, reopened")
    assert device.stripes()["hydrated"] >= len(metadata.hydrated)
    device.stop()
    return status


@pytest.mark.data_paths("zero-copy", "copy")
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
