"""Disks that never answer: every command comes to an end, and all is well once they do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.guest import BLOCK, read, write
from support.ondisk import DATA_OFFSET, read_metadata
from support.processes import starting_pid
from support.served import FLUSH, serve
from support.shell import until
from support.variant import Variant

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
COLD = 9 * STRIPE


def is_stuck(pid: int) -> bool:
    """Whether a process waits for a disk, unkillable."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
    except (FileNotFoundError, ProcessLookupError):  # the latter amid reading
        return False


def wait_until_gone(device: Device) -> None:
    until(lambda: not device.running, "the daemon has ended", 20.0)
    device.live = False


def test_an_image_that_never_answers(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
) -> None:
    image = make_image(SIZE, on="ram")
    stuck = mapper.map(image.path)
    device = ubi.add(stuck.path, make_base(SIZE), size=SIZE, stripe_size=STRIPE)
    write(device, 0, b"k" * BLOCK)
    stuck.suspend()
    reader = Background(lambda: read(device, COLD))
    until(lambda: device.status()["cold_reads"] > 0, "a read that hangs")

    assert ubi.command("status", device.name).code == 0
    assert device.name in ubi.command("list").stdout
    refused = ubi.command("del", device.name)
    assert refused.code == 5
    assert f"process {os.getpid()}" in refused.stderr

    late = ubi.command("del", device.name, "--force", "--timeout", 1)
    device.live = False
    assert (late.code, late.stdout) == (6, "")
    assert late.stderr.count("\n") == 1
    assert device.name in late.stderr
    assert not device.running
    shown = ubi.command("status", device.name, "--json")
    assert (shown.code, shown.json()["state"]) == (3, "dead")

    stuck.resume()
    assert reader.errno() is not None
    assert ubi.command("del", device.name).code == 0
    device.start()
    assert read(device, COLD) == image.content[COLD : COLD + BLOCK]
    assert read(device, 0) == b"k" * BLOCK
    device.stop()


@pytest.mark.parametrize("what", ["image", "base"])
def test_del_has_a_limit(ubi: Ubi, undo: Undo, seed: int, what: str) -> None:
    """Nobody uses the disk; what its daemon itself has to end hangs."""
    image, base = serve(undo, SIZE, seed=seed), serve(undo, DATA_OFFSET + SIZE)
    device = ubi.add(image.path, base.path, stripe_size=STRIPE)
    if what == "image":
        image.hold(lambda request: request.length > BLOCK)
        read(device, COLD)
        image.wait_for_held()
    else:
        base.hold(lambda request: request.kind == FLUSH)
        write(device, COLD, b"w" * BLOCK)

    late = ubi.command("del", device.name, "--timeout", 1)
    assert (late.code, late.stdout) == (6, "")
    assert late.stderr.count("\n") == 1
    assert device.name in late.stderr
    assert "--force" in late.stderr
    until(lambda: device.status()["state"] == "stopping", "it is stopping")
    assert ubi.command("status", device.name).code == 0
    # A second one waits for the same end.
    again = Background(lambda: ubi.command("del", device.name, "--if-exists"))
    assert device.status()["state"] == "stopping"
    image.release()
    base.release()
    assert again.result().code == 0
    wait_until_gone(device)
    found = read_metadata(base.path)
    assert (found.minor, found.extension.is_open) == (1, False)
    assert COLD // STRIPE in found.hydrated


def test_forced_del_of_a_daemon_that_hangs(ubi: Ubi, undo: Undo, seed: int) -> None:
    """… in its own fetch: it is killed, and what it was doing harms nobody."""
    image, base = serve(undo, SIZE, seed=seed), serve(undo, DATA_OFFSET + SIZE)
    device = ubi.add(image.path, base.path, stripe_size=STRIPE)
    write(device, 0, b"k" * BLOCK)
    image.hold(lambda request: request.length > BLOCK)
    read(device, COLD)
    image.wait_for_held()
    late = ubi.command("del", device.name, "--force", "--timeout", 1)
    device.live = False
    assert late.code == 6
    assert not device.running
    image.release()
    assert ubi.command("del", device.name).code == 0
    device.start()
    assert read(device, 0) == b"k" * BLOCK
    assert read(device, COLD) == image.at(COLD, BLOCK)
    device.stop()


def test_add_can_be_interrupted(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
    tmp_path: Path,
) -> None:
    """The image does not answer when it is opened; the caller has seen enough."""
    variant = Variant(tmp_path)
    variant.replace("launch.py", "STOP_WAIT_S = 10.0", "STOP_WAIT_S = 0.5")
    stuck = mapper.map(make_image(SIZE, on="ram").path)
    stuck.suspend()
    base = make_base(SIZE)
    device = ubi.new(stuck.path, base, size=SIZE)
    with variant.in_use():
        starting = device.begin_start()
    pid = until(lambda: starting_pid(device.name), "a daemon that has its name")
    until(lambda: is_stuck(pid), "a daemon that hangs")
    assert ubi.command("status", device.name).code == 0
    assert ubi.command("del", device.name, "--timeout", 0.5).code != 0
    starting.process.send_signal(signal.SIGINT)
    outcome = starting.outcome()
    assert (outcome.code, outcome.stdout) == (6, "")
    assert outcome.stderr.count("\n") == 1
    assert f"process {pid}" in outcome.stderr
    stuck.resume()
    until(lambda: not os.path.exists(f"/proc/{pid}"), "the daemon has ended")
    assert not os.path.exists(base)
    assert device.name not in ubi.command("list").stdout


def test_add_has_a_limit(ubi: Ubi, undo: Undo, seed: int, tmp_path: Path) -> None:
    """The image's last stripe, which the disk cannot do without, does not come."""
    variant = Variant(tmp_path)
    variant.replace("kernel_device.py", "START_TIMEOUT_S = 60.0", "START_TIMEOUT_S = 1.0")
    variant.replace("control.py", "STOP_TIMEOUT_S = 30.0", "STOP_TIMEOUT_S = 1.0")
    image = serve(undo, SIZE - STRIPE // 2, seed=seed)
    base = serve(undo, DATA_OFFSET + SIZE)
    device = ubi.new(image.path, base.path, stripe_size=STRIPE)
    image.hold(lambda _: base.at(0, 8) == b"BDEV_UBI")
    with variant.in_use():
        outcome = device.begin_start().outcome()
    assert (outcome.code, outcome.stdout) == (6, "")
    assert outcome.stderr.count("\n") == 1
    assert "last stripe" in outcome.stderr
    assert device.name not in ubi.command("list").stdout
    image.release()
    device.start()
    assert read(device, SIZE - STRIPE, STRIPE // 2) == image.at(SIZE - STRIPE, STRIPE // 2)
    device.stop()
