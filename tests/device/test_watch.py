"""The watch: disks whose daemons die come back by themselves, until one dies again and again."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from support.device import RUN_ROOT, Running
from support.guest import BLOCK, read, write
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.device import Device, Ubi
    from support.images import Image

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def watch() -> Iterator[Running]:
    """The watch of this test, which ends with it."""
    lock = RUN_ROOT / ".watch.lock"
    lock.unlink(missing_ok=True)                # that of the test before
    running = Running(["watch"])
    until(lock.exists, "the watch")
    yield running
    running.process.send_signal(signal.SIGINT)
    assert running.outcome().stderr.endswith("interrupted\n")


@pytest.fixture
def device(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> Device:
    return ubi.add(make_image(SIZE), make_base(SIZE), recovery=True)


def new_daemon(device: Device, old: int) -> int | None:
    """The process that serves a disk instead of `old`."""
    try:
        pid = int((RUN_ROOT / device.name / "pid").read_text())
        return pid if pid != old and device.call("status")["state"] == "live" else None
    except (OSError, ValueError, AssertionError):
        return None


def test_a_dead_daemon_is_replaced(device: Device) -> None:
    write(device, 0, b"a" * BLOCK)
    device.kill()
    assert read(device, 0) == b"a" * BLOCK  # waits for the new daemon
    device.pid = until(lambda: new_daemon(device, device.pid), "a new daemon") or -1
    device.live = True


def test_five_deaths_in_a_minute_are_enough(ubi: Ubi, device: Device) -> None:
    with device.open(os.O_RDONLY):
        for _ in range(4):
            old = device.pid
            device.kill()
            device.pid = until(lambda old=old: new_daemon(device, old), "a new daemon", 20) or -1
        device.kill()
        trouble = RUN_ROOT / device.name / "trouble"
        until(trouble.exists, "the watch gives up")
        status = ubi.command("status", device.name)
        assert status.code == 3
        assert "died 5 times within 60 s" in status.stdout
        assert f"ublk-ubi recover {device.name}" in status.stdout
        # Told to, it may be the watch who is first to bring it back.
        assert ubi.command("recover", device.name).code in (0, 5)
        assert not trouble.exists()
        device.pid = until(lambda: new_daemon(device, device.pid), "a new daemon") or -1
        device.live = True
    assert ubi.command("status", device.name).code == 0


def test_a_daemon_that_left_is_not_brought_back(ubi: Ubi, device: Device) -> None:
    with device.open(os.O_RDONLY):
        os.kill(device.pid, signal.SIGTERM)
        until(lambda: not device.running, "the daemon's end")
        device.live = False
        status = ubi.command("status", device.name)
        assert (status.code, "left" in status.stdout) == (3, True)
    device.start()
