"""Background hydration: all of the image comes to the base, at its pace, beside everything else."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from support import ondisk
from support.background import Background
from support.direct import DirectFile, assert_content
from support.guest import BLOCK, fails, flush, read, write
from support.ondisk import DATA_OFFSET
from support.served import READ, serve
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.served import ServedDisk
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 8 * MIB
STRIPES = SIZE // STRIPE


def hydration(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = device.status()["hydration"]
    return found


def wait_for_state(device: Device, state: str, timeout_s: float = 20.0) -> dict[str, Any]:
    """Wait until background hydration is in a state; return what the device says of it."""
    return until(
        lambda: found if (found := hydration(device))["state"] == state else {},
        f"hydration is {state!r}, not {hydration(device)}", timeout_s,
    )


def wait_for_stripes(device: Device, count: int, timeout_s: float = 20.0) -> None:
    until(lambda: device.stripes()["hydrated"] >= count, f"{count} stripes", timeout_s)


def open_files(pid: int) -> set[str]:
    """What a process has open, by path."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def is_locked(path: str) -> bool:
    """Whether anybody holds a lock on a file, a ring that has it registered as well."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# -- to the end -----------------------------------------------------------------------------------

@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.cpus(2)
def test_the_image_is_needed_no_more(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """Closed, unlocked, deleted; and the disk is what it was, also when it is opened again."""
    image = make_image(SIZE - 12_345, holes=0.3)
    base = make_base(SIZE)
    device = ubi.add(image, base, stripe_size=STRIPE, queues=2, copy_on_read=False)
    expected = bytearray(image.as_disk(device.size))
    for at, length in ((3 * STRIPE, STRIPE), (7 * STRIPE + 512, BLOCK)):
        write(device, at, b"w" * length)
        expected[at : at + length] = b"w" * length
    status = device.status()
    assert (status["independent"], status["hydration"]["state"]) == (False, "off")
    assert status["space"]["needed"] == (STRIPES - 3) * STRIPE
    assert image.path in open_files(device.pid)
    assert is_locked(image.path)

    device.hydrate(run=True)
    status = device.wait_until_independent()
    assert status["stripes"] == dict.fromkeys(("total", "hydrated", "committed"), STRIPES)
    assert status["hydration"]["state"] == "done"
    assert status["space"] == status["space"] | {"needed": 0, "hydrated": SIZE}
    assert image.path not in open_files(device.pid)
    assert not is_locked(image.path)
    image.assert_untouched()
    os.unlink(image.path)
    assert_content(device.node, expected, "the disk without its image")
    write(device, STRIPE + 512, b"x" * BLOCK)
    expected[STRIPE + 512 : STRIPE + 512 + BLOCK] = b"x" * BLOCK
    flush(device)
    time_of_status = status["uptime_s"]
    until(lambda: device.status()["uptime_s"] > time_of_status + 2.1, "two more looks have passed")
    assert device.status()["degraded"] is None
    device.stop()
    assert ondisk.read_metadata(base).hydrated == set(range(STRIPES))

    device.start()                         # the image is named still, and is not there
    assert any("not needed" in warning for warning in device.warnings)
    assert device.status()["independent"]
    assert_content(device.node, expected, "the disk, reopened")
    device.stop()
    device.options["image"] = None
    device.start()
    assert device.status()["independent"]
    assert_content(device.node, expected, "the disk, reopened with no image named")


def test_without_all_of_it_the_image_is_needed(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    image = make_image(SIZE)
    base = make_base(SIZE)
    device = ubi.add(image, base, stripe_size=STRIPE)
    write(device, 0, b"w" * BLOCK)
    device.stop()
    os.rename(image.path, f"{image.path}.away")
    assert image.path in ubi.refused(image, base, code=1)
    line = ubi.refused(None, base, code=1)
    assert "--image" in line
    os.rename(f"{image.path}.away", image.path)
    device.start()
    assert read(device, STRIPE) == image.content[STRIPE : STRIPE + BLOCK]


def test_a_killed_hydration_goes_on(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, hydrate=True, rate=2 * MIB)
    wait_for_stripes(device, 8)
    device.kill()
    device.start(rate=None)
    device.wait_until_independent()
    assert_content(device.node, image.content, "the disk")
    # Killed with all of it there, and the image gone meanwhile.
    device.kill()
    os.unlink(image.path)
    device.start()
    assert device.status()["independent"]
    assert_content(device.node, image.content, "the disk, without its image")


# -- what an operator says ------------------------------------------------------------------------

def test_it_is_started_paused_and_paced_while_it_runs(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, rate=4 * STRIPE)
    assert hydration(device)["state"] == "off"
    assert hydration(device)["rate"] == 4 * STRIPE
    started = device.hydrate(run=True)["hydration"]
    assert started["state"] == "running"
    wait_for_stripes(device, 3)
    device.hydrate(run=False)
    assert hydration(device)["state"] == "paused"
    # What was under way has ended with the next look; nothing comes after it.
    device.wait_until_committed()
    before, uptime = device.stripes()["hydrated"], device.status()["uptime_s"]
    until(lambda: device.status()["uptime_s"] > uptime + 1.5, "time passes")
    assert device.stripes()["hydrated"] == before < STRIPES
    assert device.hydrate(rate="max")["hydration"]["rate"] is None
    assert hydration(device)["state"] == "paused", "a rate starts nothing"
    device.hydrate(run=True)
    device.wait_until_independent()
    assert hydration(device)["state"] == "done"
    assert device.hydrate(run=False)["hydration"]["state"] == "done"
    assert_content(device.node, image.content, "the disk")


def test_the_rate_is_kept(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """Never more than the time allows; and not much less."""
    image = make_image(SIZE)
    rate = 32 * STRIPE
    began = time.monotonic()
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, hydrate=True, rate=rate)
    for count in (16, 48, 80):
        wait_for_stripes(device, count)
        there = device.stripes()["hydrated"]
        assert there * STRIPE <= rate * (time.monotonic() - began) + rate // 8
    late = time.monotonic() - began
    assert late < 8 * 80 / 32, f"80 stripes took {late:.1f} s at 32 a second"
    state = hydration(device)["state"]
    over = rate * (time.monotonic() - began) + rate // 8 >= SIZE
    assert state == "running" or (state == "done" and over), state


# -- what goes wrong ------------------------------------------------------------------------------

def test_what_fails_is_tried_again(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
) -> None:
    """Later and later by itself, and at once when told; all else goes on."""
    image = make_image(SIZE, on="loop")
    below = mapper.map(image.path)
    below.table(f"0 {below.sectors} dust {below.below} 0 {BLOCK}")
    device = ubi.add(below.path, make_base(SIZE), size=SIZE, stripe_size=STRIPE)
    bad = [37 * STRIPE + BLOCK, 90 * STRIPE]
    for offset in bad:
        below.message("addbadblock", offset // BLOCK)
    below.message("enable")
    device.hydrate(run=True)
    wait_for_stripes(device, STRIPES - 2)
    found = wait_for_state(device, "waiting")
    assert (found["last_error"], found["failed"] >= 2) == (5, True)
    assert fails(read, device, bad[0])
    assert read(device, bad[0] + BLOCK) == image.content[bad[0] + BLOCK : bad[0] + 2 * BLOCK]
    assert device.status()["degraded"] is None

    below.message("removebadblock", bad[0] // BLOCK)
    wait_for_stripes(device, STRIPES - 1)
    until(lambda: hydration(device)["retry_in_s"] >= 4, "it waits longer", 20.0)
    below.message("removebadblock", bad[1] // BLOCK)
    waiting, began = hydration(device)["retry_in_s"], device.status()["uptime_s"]
    device.hydrate(run=True)
    wait_for_stripes(device, STRIPES)
    assert device.status()["uptime_s"] < began + waiting - 1, "at once"
    status = device.wait_until_independent()
    assert status["hydration"]["state"] == "done"
    assert_content(device.node, image.content, "the disk")


def test_an_image_that_dies_and_returns(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
) -> None:
    image = make_image(SIZE, on="loop")
    below = mapper.map(image.path)
    device = ubi.add(below.path, make_base(SIZE), size=SIZE, stripe_size=STRIPE)
    write(device, 0, b"h" * BLOCK)
    below.error()
    device.hydrate(run=True)
    found = wait_for_state(device, "waiting")
    assert found["failed"] >= STRIPES - 1
    write(device, BLOCK, b"i" * BLOCK)
    flush(device)
    below.linear()
    device.wait_until_independent()
    expected = b"h" * BLOCK + b"i" * BLOCK + image.content[2 * BLOCK :]
    assert_content(device.node, expected, "the disk")


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("change", ["written", "shorter"])
def test_an_image_that_changes_ends_it(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], change: str,
) -> None:
    """Nothing of the image is copied or served from then on; what the base has is."""
    image = make_image(SIZE)
    device = ubi.add(
        image, make_base(SIZE), size=SIZE, stripe_size=STRIPE, hydrate=True, rate=4 * STRIPE,
        copy_on_read=False,
    )
    write(device, 0, b"h" * BLOCK)
    with open(image.path, "r+b") as file:
        if change == "written":
            file.write(b"x")
        else:
            file.truncate(SIZE - STRIPE)
    wait_for_state(device, "no-image")
    degraded = device.status()["degraded"]
    assert image.path in degraded
    assert ("size" if change == "shorter" else "change time") in degraded
    assert degraded.endswith("until the device is added anew, with the image as it was")
    device.hydrate(run=True, rate="max")
    assert hydration(device)["state"] == "no-image"
    uptime = device.status()["uptime_s"]
    until(lambda: device.status()["uptime_s"] > uptime + 1.2, "time passes")
    there = device.stripes()["hydrated"]
    assert there < STRIPES // 2

    cold = 100 * STRIPE
    assert fails(read, device, cold)
    assert fails(write, device, cold, b"p" * BLOCK)
    assert fails(write, device, cold, b"p" * BLOCK, fua=True)
    write(device, cold, b"w" * STRIPE)
    assert read(device, cold, STRIPE) == b"w" * STRIPE
    assert read(device, 0) == b"h" * BLOCK
    write(device, BLOCK, b"i" * BLOCK)
    flush(device)
    assert device.stripes()["hydrated"] == there + 1
    device.stop()


def held_bytes(disk: ServedDisk) -> int:
    """Bytes of requests that are held; the kernel makes one of what lies side by side."""
    return sum(request.length for request in disk.held)


def test_demand_is_served_while_hydration_waits_for_a_slow_image(
    ubi: Ubi, undo: Undo, make_base: Callable[..., str], seed: int,
) -> None:
    """Hydration has half of the stripe buffers at most, and never what demand needs."""
    image = serve(undo, 16 * MIB, seed=seed)
    device = ubi.add(image.path, make_base(0), size=16 * MIB, stripe_size=STRIPE)
    half = 8 * MIB
    write(device, 15 * MIB, b"h" * BLOCK)
    image.hold(lambda asked: asked.kind == READ and asked.offset < half)
    device.hydrate(run=True)
    until(lambda: held_bytes(image) >= 16 * STRIPE, "half of the buffers are in use")
    cold = Background(lambda: write(device, 0, b"c" * BLOCK))       # a stripe that is being fetched

    for number in range(40):               # more than there are buffers
        at = half + 2 * number * STRIPE
        write(device, at + 512, b"p" * 512)
        assert read(device, at + STRIPE) == image.at(at + STRIPE, BLOCK)
    flush(device)
    assert read(device, 15 * MIB) == b"h" * BLOCK
    assert held_bytes(image) == 16 * STRIPE
    assert not cold.done
    image.release()
    cold.result()
    device.wait_until_independent()
    expected = bytearray(image.content)
    expected[:BLOCK] = b"c" * BLOCK
    expected[15 * MIB : 15 * MIB + BLOCK] = b"h" * BLOCK
    for number in range(40):
        at = half + 2 * number * STRIPE + 512
        expected[at : at + 512] = b"p" * 512
    assert_content(device.node, expected, "the disk")


def test_guests_beside_the_hydration_of_a_delayed_image(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
) -> None:
    image = make_image(SIZE, on="loop")
    slow = mapper.map(image.path)
    device = ubi.add(slow.path, make_base(SIZE), size=SIZE, stripe_size=STRIPE)
    slow.delay(read_ms=300)
    device.hydrate(run=True, rate=8 * STRIPE)
    expected = bytearray(image.content)

    def use(number: int) -> None:
        at, data = number * 9 * STRIPE + 512, bytes([number + 1]) * 512
        assert read(device, at + 512) == image.content[at + 512 : at + 512 + BLOCK]
        write(device, at, data)
        expected[at : at + 512] = data

    for using in [Background(functools.partial(use, number)) for number in range(14)]:
        using.result()
    assert device.stripes()["hydrated"] < STRIPES
    slow.linear()
    device.hydrate(rate="max")
    assert_content(device.node, expected, "the disk while it hydrates")
    device.wait_until_independent()
    assert_content(device.node, expected, "the disk")


# -- zeros ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("image_on", ["ext4", "ram"], ids=["file", "block"])
def test_zeros_take_no_room(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], image_on: str,
) -> None:
    image = make_image(32 * MIB, on=image_on, holes=0.9)
    zeros = sum(
        not any(image.content[at : at + STRIPE]) for at in range(0, image.size, STRIPE)
    )
    base = make_base(0)
    device = ubi.add(image, base, stripe_size=STRIPE, hydrate=True)
    status = device.wait_until_independent()
    assert status["hydration"]["zeros"] == zeros > 100
    allocated = os.stat(base).st_blocks * 512
    most = DATA_OFFSET + image.size - zeros * STRIPE + MIB
    assert image.size // 40 < allocated < most
    until(lambda: device.status()["space"]["allocated"] < most, "the status tells the same")
    assert_content(device.node, image.content, "the disk")


@pytest.mark.parametrize("base_on", ["ext4", "tmpfs", "ubd", "ram", "dm"])
def test_zeros_overwrite_what_an_old_disk_has_left(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], base_on: str,
) -> None:
    image = make_image(4 * MIB, holes=0.5)
    base = make_base(4 * MIB, on=base_on)
    if base_on in ("ext4", "tmpfs"):
        with open(base, "wb") as file:
            file.truncate(DATA_OFFSET + 4 * MIB)
    with DirectFile(base) as file:
        file.pwrite(b"\xa5" * (4 * MIB), DATA_OFFSET)
    device = ubi.add(image, base, stripe_size=STRIPE, format=True, hydrate=True)
    assert device.wait_until_independent()["hydration"]["zeros"] > 10
    assert_content(device.node, image.content, "the disk")
