"""Queues: a thread each, where it is told to run, whatever the load's balance."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.direct import SECTOR, assert_content
from support.guest import BLOCK, flush, write
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image

pytestmark = pytest.mark.cpus(2)

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 6 * MIB
STRIPES = SIZE // STRIPE
CPUS = sorted(os.sched_getaffinity(0))

needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")


def threads(device: Device) -> dict[str, dict[str, str]]:
    """What /proc says of the daemon's threads, by their name."""
    found = {}
    for folder in Path(f"/proc/{device.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            lines = (folder / "status").read_text().splitlines()
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            found[fields["Name"]] = fields
    return found


def test_fewer_than_were_asked_for_are_told_of(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    there = os.cpu_count() or 1
    device = ubi.add(make_image(MIB), make_base(MIB), queues=there + 2)
    assert device.status()["queues"] == there
    assert device.warnings == [
        f"--queues {there + 2}: {device.node} has {there}, as many as there are CPUs",
    ]
    device.reopen(queues=there)
    assert device.warnings == []


@needs_two_cpus
def test_threads_run_where_they_are_told_to(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    first, second = CPUS[:2]
    device = ubi.add(
        make_image(MIB), make_base(MIB), queues=2, cpus=f"{second},{first}",
        hydrator_cpus=f"{second}",
    )
    assert device.status()["queues"] == 2
    found = {name: fields["Cpus_allowed_list"] for name, fields in threads(device).items()}
    assert found["ubi-queue-0"] == str(second)
    assert found["ubi-queue-1"] == str(first)
    assert found["ubi-hydrator"] == str(second)
    device.reopen(cpus=f"{first}", hydrator_cpus=None)
    found = {name: fields["Cpus_allowed_list"] for name, fields in threads(device).items()}
    assert found["ubi-queue-0"] == found["ubi-queue-1"] == str(first)
    assert found["ubi-hydrator"] == found["python"], "wherever there is room"
    assert f"CPU {max(CPUS) + 7}" in ubi.refused(
        make_image(MIB), make_base(MIB), code=2, size=MIB, cpus=f"{first},{max(CPUS) + 7}",
    )


@needs_two_cpus
@pytest.mark.usefixtures("no_watch")
def test_a_cpu_that_is_gone_keeps_no_disk_from_coming_back(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """Offline, or not in its next daemon's cpuset: requests wait, which must run anywhere then."""
    first, second = CPUS[:2]
    device = ubi.add(
        make_image(MIB), make_base(MIB), queues=2, cpus=f"{first},{second}",
        hydrator_cpus=f"{second}", recovery=True,
    )
    device.kill()
    os.sched_setaffinity(0, {first})       # what is started from here inherits that
    try:
        device.recover()
    finally:
        os.sched_setaffinity(0, CPUS)
    found = {name: fields["Cpus_allowed_list"] for name, fields in threads(device).items()}
    assert [found[f"ubi-{name}"] for name in ("queue-0", "queue-1", "hydrator")] == 3 * [str(first)]
    assert f"--hydrator-cpus {second}: CPU {second} cannot be used here" in device.log()
    write(device, 0, b"w" * BLOCK)


@pytest.mark.data_paths("zero-copy", "copy")
def test_an_idle_disk_sleeps(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """After load, too: threads that wake one another for nothing would use up a CPU."""
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, queues=min(2, len(CPUS)))
    for stripe in range(0, STRIPES, 2):
        write(device, stripe * STRIPE, b"w" * BLOCK)
    flush(device)
    device.wait_until_committed()

    def switches() -> int:
        return sum(
            int(fields["voluntary_ctxt_switches"]) for name, fields in threads(device).items()
            if name.startswith("ubi-queue")
        )

    until(lambda: device.stripes()["hydrated"] == STRIPES // 2, "copy-on-read has nothing to do")
    before, uptime = switches(), device.status()["uptime_s"]
    until(lambda: device.status()["uptime_s"] > uptime + 2.0, "time passes")
    assert switches() - before <= 4, "nobody has asked a queue for anything"


def on(cpu: int, work: Callable[[], None]) -> Background[None]:
    """Do it on a thread that runs on one CPU, and so uses one queue."""
    def run() -> None:
        os.sched_setaffinity(threading.get_native_id(), {cpu})
        work()

    return Background(run)


@needs_two_cpus
@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("balance", [(1, 0), (5, 1), (2, 2)], ids=["one", "most", "even"])
def test_stripes_that_queues_share(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], seed: int,
    balance: tuple[int, int],
) -> None:
    """Both queues write to every stripe, cold and hot, each its own sectors of it; one may have
    most of the work, or all of it."""
    image = make_image(SIZE, holes=0.2)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, queues=2, hydrate=True,
                     rate=MIB)
    expected = bytearray(image.content)
    count = sum(balance)
    per_stripe = STRIPE // SECTOR

    def work(number: int) -> None:
        rng = random.Random(seed + number)
        with device.open() as disk:
            for turn in range(2):
                for stripe in rng.sample(range(STRIPES), STRIPES):
                    first = rng.randrange(per_stripe // count) * count + number
                    at = stripe * STRIPE + first % per_stripe * SECTOR
                    data = bytes([number + 1 + 16 * turn]) * SECTOR
                    disk.pwrite(data, at)
                    expected[at : at + SECTOR] = data
                    if rng.random() < 0.05:
                        disk.fsync()
                    if rng.random() < 0.1:
                        assert disk.pread(at, SECTOR) == data

    placed = [CPUS[0]] * balance[0] + [CPUS[1]] * balance[1]
    for worker in [on(cpu, lambda number=number: work(number))
                   for number, cpu in enumerate(placed)]:
        worker.result(60.0)
    assert_content(device.node, expected, "the disk")
    device.hydrate(rate="max")
    device.wait_until_independent()
    device.reopen(hydrate=None)
    assert_content(device.node, expected, "the disk, reopened")
