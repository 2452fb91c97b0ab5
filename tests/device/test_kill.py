"""A killed daemon: every write that was completed is there again, whenever the kill came."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.device import RUN_ROOT
from support.guest import BLOCK, fails, flush, read, write
from support.load import Record, Writers
from support.ondisk import DATA_OFFSET, read_metadata
from support.processes import starting_pid
from support.served import ServedDisk, serve
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.ondisk import Metadata
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
LOAD_SIZE = 8 * MIB
KILLS = 3


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize(
    ("on", "options"),
    [
        pytest.param("ext4", {"queues": 2, "size": LOAD_SIZE}, id="file-2q",
                     marks=pytest.mark.cpus(2)),
        pytest.param("ram", {"copy_on_read": False, "zero": True}, id="disk-1q"),
    ],
)
def test_kill_under_load(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], seed: int,
    on: str, options: dict[str, object],
) -> None:
    image = make_image(LOAD_SIZE - 5 * STRIPE - 512 * 3)
    device = ubi.add(image, make_base(LOAD_SIZE, on=on), stripe_size=STRIPE, **options)
    record = Record(image.content, LOAD_SIZE, STRIPE)
    rng = random.Random(seed)
    number = 1
    for kill in range(KILLS):
        writers = Writers(device, record, threads=4, seed=seed + 10 * kill, first=number)
        writers.wait_for(rng.randrange(30, 400))
        device.kill()
        writers.join()
        number = writers.next_number
        assert writers.failed, "the disk went away under its writers"
        device.start()
        assert device.status()["generation"] == 1
        record.check(device)
    writers = Writers(device, record, threads=4, seed=seed - 1, first=number)
    writers.wait_for(100)
    writers.join(stop=True)
    assert not writers.failed
    device.stop()
    assert assert_closed(device.options["base"]).extension.generation == 1
    device.start()
    assert record.check(device) == 0
    image.assert_untouched()


def assert_closed(base: str) -> Metadata:
    found = read_metadata(base)
    assert (found.minor, found.extension.is_open) == (1, False)
    return found


class Steps:
    """A device on a served base: every write and flush of the base is a point to be killed at."""

    def __init__(self, ubi: Ubi, undo: Undo, image: Image) -> None:
        self.image = image
        self.base: ServedDisk = serve(undo, DATA_OFFSET + SIZE)
        self.device: Device = ubi.new(image, self.base.path, stripe_size=STRIPE)
        self.written: dict[int, bytes] = {}

    def write(self, offset: int, letter: bytes) -> None:
        write(self.device, offset, letter * BLOCK)
        self.written[offset] = letter * BLOCK

    def wipe(self) -> None:
        """Another base, empty, in the place of this one; nobody will ask for that one's table."""
        for slot in (5 * MIB, 5 * MIB + 4096):
            uuid = self.base.at(slot + 88, 16).hex()
            (RUN_ROOT / ".tables" / f"{uuid}.new").unlink(missing_ok=True)
        self.base.content[:] = bytes(len(self.base.content))

    def check(self) -> None:
        """Everything written is there, the rest is the image's."""
        expected = bytearray(self.image.content)
        for offset, data in self.written.items():
            expected[offset : offset + BLOCK] = data
        assert read(self.device, 0, SIZE) == expected

    def kill_add_at(self, step: int, *, lands: bool) -> bool:
        """Kill an `add` at a step of its base's; False if it was live before it came to that."""
        self.base.hold_from_step(step)
        starting = self.device.begin_start()
        until(lambda: self.base.held or starting.done, f"step {step} of add", 30.0)
        if starting.done:
            self.base.release()
            self.device.finish_start()
            return False
        pid = starting_pid(self.device.name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        # An fdatasync is a thread of the daemon's, which ends with it and not before.
        self.base.release(apply=lands)
        outcome = starting.outcome()
        assert outcome.code == 1, outcome
        assert outcome.stderr.count("\n") == 1
        assert "was killed by SIGKILL before its device was live" in outcome.stderr
        return True

    def kill_del_at(self, step: int, *, lands: bool) -> bool:
        """Kill the daemon at a step of its clean stop; False if it was closed before that."""
        self.base.hold_from_step(step)
        deleting = Background(self.device.stop)
        until(lambda: self.base.held or deleting.done, f"step {step} of del", 30.0)
        if deleting.done:
            self.base.release()
            deleting.result()
            return False
        os.kill(self.device.pid, signal.SIGKILL)
        self.device.live = False
        self.base.release(apply=lands)
        deleting.join()
        return True


@pytest.fixture
def steps(ubi: Ubi, undo: Undo, make_image: Callable[..., Image]) -> Steps:
    return Steps(ubi, undo, make_image(SIZE))


@pytest.mark.limit(180)
def test_kill_at_every_step_of_making_a_base(steps: Steps) -> None:
    """Each time on a fresh disk; and the next `add` puts right what the last one has left."""
    steps.device.start()
    order = [request for request in steps.base.seen if request.changes]
    steps.device.stop()
    zeroing = max(request.length for request in order)
    points = [number for number, request in enumerate(order, 1) if request.length < zeroing]
    assert len(points) >= 9, "of slot, page 0 and opening each with its fdatasync, and the first"
    rng = random.Random(1)
    for step in points:
        steps.wipe()
        assert steps.kill_add_at(step, lands=rng.random() < 0.5), step
    assert steps.kill_add_at(2, lands=True)
    steps.device.start()
    steps.check()
    steps.write(STRIPE, b"w")
    steps.device.stop()
    assert_closed(steps.base.path)


def test_kill_at_every_step_of_going_on(steps: Steps) -> None:
    """The table knows what the base does not: until that is committed, nothing may be lost."""
    steps.device.start()
    steps.write(0, b"a")
    flush(steps.device)
    steps.base.fail(lambda request: request.is_metadata_write)
    steps.write(STRIPE, b"b")
    steps.write(2 * STRIPE, b"c")
    assert fails(flush, steps.device)
    steps.device.kill()
    steps.base.heal()
    assert read_metadata(steps.base.path).hydrated == {0}
    step = 1
    while steps.kill_add_at(step, lands=step % 2 == 0):
        step += 1
    assert step >= 4, "fdatasync, commit's fdatasync, page, fdatasync"
    assert steps.device.status()["generation"] == 1
    assert read_metadata(steps.base.path).hydrated == {0, 1, 2}
    steps.check()


def test_kill_at_every_step_of_a_clean_stop(steps: Steps) -> None:
    steps.device.start()
    step = 1
    while True:
        steps.write(step * STRIPE, bytes([step]))
        if not steps.kill_del_at(step, lands=step % 2 == 1):
            break
        steps.device.start()
        steps.check()
        step += 1
    assert step >= 5, "at least slot, fdatasync, head, fdatasync; a tick may have committed"
    assert assert_closed(steps.base.path).hydrated >= set(range(1, step + 1))
    steps.device.start()
    steps.check()


def test_a_clean_stop_commits_what_no_tick_has(steps: Steps) -> None:
    """One stripe is in a round that hangs, the next waits for a round of its own."""
    steps.device.start()
    steps.base.hold(lambda request: request.is_metadata_write)
    steps.write(STRIPE, b"a")
    steps.base.wait_for_held()
    steps.write(2 * STRIPE, b"b")
    deleting = Background(steps.device.stop)
    until(lambda: not threads_of(steps.device, "ubi-queue"), "the queues have ended")
    assert not deleting.done
    steps.base.release()
    deleting.result()
    assert assert_closed(steps.base.path).hydrated == {1, 2}
    steps.device.start()
    steps.check()


def threads_of(device: Device, name: str) -> list[str]:
    """The daemon's threads that are called so."""
    found = []
    for path in Path(f"/proc/{device.pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            found.append(path.read_text().strip())
    return [thread for thread in found if thread.startswith(name)]


def test_kill_add_at_any_time(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], seed: int,
) -> None:
    """Between its I/Os, too: with a name, with a ublk device, with a disk, with a link."""
    image = make_image(SIZE)
    base = make_base(SIZE)
    rng = random.Random(seed)
    device = ubi.new(image, base, size=SIZE, stripe_size=STRIPE)
    killed = 0
    for _ in range(6):
        starting = device.begin_start()
        pid = until(lambda: starting_pid(device.name), "a daemon that has its name")
        time.sleep(rng.uniform(0.0, 0.4))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            raise AssertionError(starting.outcome()) from None
        killed += starting.outcome().code != 0
        until(lambda: starting_pid(device.name) is None, "the daemon has ended")
    assert killed
    # What is left of the last one, `del` takes away as well.
    assert ubi.command("del", device.name).code == 0
    assert not os.path.exists(device.path or "/dev/ublk-ubi/none")
    device.start()
    assert read(device, 0, SIZE) == image.content
    device.stop()
