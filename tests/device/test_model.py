"""Random operations from many threads against a model in memory, then the same disk reopened."""

from __future__ import annotations

import os

import pytest
from support import ondisk
from support.model import Model
from support.stores import BLOCK_DEVICES

MIB = 1 << 20
# Few enough stripes to be met cold and hot, and enough for every round to find cold ones.
IMAGE_SIZES = {64 << 10: 12 * MIB, 256 << 10: 24 * MIB, 1 << 20: 40 * MIB}
PLACES = {64 << 10: ("ext4", "ext4"), 256 << 10: ("xfs", "ubd"), 1 << 20: ("tmpfs", "xfs")}
SHORT = 12_345                     # the image ends inside a sector of its last stripe
TAIL = 2 * MIB                     # of the disk, behind the image
THREADS = 16
ROUNDS = 6
OPERATIONS = int(os.environ.get("UBLK_UBI_OPERATIONS", "1800"))


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
