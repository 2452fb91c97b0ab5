"""The disk has no I/O scheduler of its own, unless somebody gives it one."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.direct import DirectFile
from support.images import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.mapper import Mapper

pytestmark = pytest.mark.usefixtures("no_watch")

MIB = 1 << 20
# Of a 66 MiB image: between two blocks of its fingerprint.
SLOW, SLOW_LENGTH, DELAY_MS = 5 * MIB // 4, MIB // 2, 4000
ATTEMPTS = 20


def scheduler(device: Device) -> Path:
    return Path("/sys/block", Path(device.node).resolve().name, "queue/scheduler")


def chosen(device: Device) -> str:
    return scheduler(device).read_text().partition("[")[2].partition("]")[0]


def test_a_disk_has_none_and_keeps_what_it_is_given(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(MIB), make_base(MIB), recovery=True)
    assert chosen(device) == "none"
    assert "mq-deadline" in scheduler(device).read_text(), "the kernel has none to give"
    scheduler(device).write_text("mq-deadline")
    device.kill()
    device.recover()
    assert chosen(device) == "mq-deadline"


class Reader(threading.Thread):
    """Reads a slow part of the next disk as soon as there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.before = set(Path("/dev").glob("ublkb*"))
        self.found = b""
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for node in set(Path("/dev").glob("ublkb*")) - self.before:
                with contextlib.suppress(OSError), DirectFile(str(node), os.O_RDONLY) as file:
                    self.found = file.pread(SLOW, 4096)
                    return


@pytest.mark.cpus(2)
@pytest.mark.limit(240)
def test_requests_that_come_at_once_are_not_waited_for(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
) -> None:
    """To drop a scheduler is to wait for them: who serves them must not."""
    image = make_image(66 * MIB, on="ram")
    disk = mapper.map(str(image.path))
    start, count = SLOW // 512, SLOW_LENGTH // 512
    rest = start + count
    disk.table(f"0 {start} linear {disk.below} 0\n"
               f"{start} {count} delay {disk.below} {start} {DELAY_MS}\n"
               f"{rest} {disk.sectors - rest} linear {disk.below} {rest}")
    slow = Image(disk.path, image.content)
    device = ubi.new(slow, make_base(66 * MIB), recovery=True)
    for _ in range(ATTEMPTS):
        reader = Reader()
        device.start()
        reading = reader.is_alive()
        if reading and chosen(device) == "mq-deadline":
            break
        reader.join()
        device.stop(force=True)
    assert reading, "no read was there before the scheduler was to go"
    device.kill()
    device.recover()
    reader.join()
    assert reader.found == image.content[SLOW : SLOW + 4096]
