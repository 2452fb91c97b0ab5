"""The fence: nobody writes a base before the last write of a killed daemon has landed.

The base is a disk whose requests the test holds in flight: those of a killed daemon land when it
says so. Each test that waits for the product has a sister that shows the harm when the very part
of the product that makes it wait is taken out.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import watch
from support.background import Background
from support.device import Outcome
from support.guest import BLOCK, flush, read, write
from support.mapper import delayed_writes
from support.ondisk import DATA_OFFSET, read_metadata
from support.processes import starting_log
from support.served import ServedDisk, serve
from support.shell import until
from support.variant import Variant

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Running, Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
HOT, COLD = 0, 5 * STRIPE          # where the guest writes
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK

# What makes an opener wait: the lock, and a block device's exclusive claim.
LOCK = ("fence.py", "fcntl.flock(fd, kind | fcntl.LOCK_NB)", "pass")
CLAIM = ("base.py", "_OPEN_FLAGS | os.O_EXCL", "_OPEN_FLAGS")
# What makes lock and claim last: the rings write through the description that carries them.
RINGS_FD = (
    "session.py", "image_fd, self.base.fd,",
    'image_fd, os.open(f"/proc/self/fd/{self.base.fd}", os.O_RDWR | os.O_DIRECT),',
)
# What makes DEL_DEV wait for the hydrator's writes.
HYDRATORS_UBLKC = ("session.py", "sync_fds[-1], self._ublkc,", "sync_fds[-1], -1,")


class Scene:
    """A device on a served base, killed while writes of its own are in flight."""

    def __init__(self, ubi: Ubi, undo: Undo, image: Image) -> None:
        self.ubi = ubi
        self.image = image
        self.base: ServedDisk = serve(undo, DATA_OFFSET + SIZE)
        self.killed: Device

    def kill_while_guests_write(self, *offsets: int) -> None:
        """… with the base write of a guest's write to each of these in flight."""
        self._start()
        writers = [Background(lambda at=at: write(self.killed, at, OLD)) for at in offsets]
        self._kill(len(offsets))
        assert not any(writer.done for writer in writers)

    def kill_while_hydrating(self, offset: int) -> None:
        """… with the write of a stripe that was read in flight; nobody has the disk open."""
        self._start()
        read(self.killed, offset)
        self._kill(1)

    def _start(self) -> None:
        self.killed = self.ubi.add(self.image, self.base.path, stripe_size=STRIPE)
        write(self.killed, HOT, b"h" * BLOCK)
        flush(self.killed)
        self.base.hold(lambda request: request.changes and request.offset >= DATA_OFFSET)

    def _kill(self, held: int) -> None:
        self.base.wait_for_held(held)
        self.killed.kill()
        assert len(self.base.held) == held, "the writes of the dead are in flight"
        self.base.hold(None)
        self.base.forget()

    def wait_at_the_fence(self, device: Device, starting: Running) -> None:
        """Wait until an `add` that is under way says that it waits, and see that it does."""
        until(
            lambda: starting.done or "waiting for base" in starting_log(device.name),
            "add waits for the base", 30.0,
        )
        assert not starting.done, starting.outcome()
        assert not any(request.changes for request in self.base.seen)

    def landed(self, offset: int) -> bytes:
        return self.base.at(DATA_OFFSET + offset, BLOCK)


@pytest.fixture
def scene(ubi: Ubi, undo: Undo, make_image: Callable[..., Image]) -> Scene:
    return Scene(ubi, undo, make_image(SIZE))


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    return Variant(tmp_path)


# -- the lock -----------------------------------------------------------------------------------

@pytest.mark.data_paths("zero-copy", "copy")
def test_add_waits_until_the_writes_of_the_dead_have_landed(scene: Scene) -> None:
    scene.kill_while_guests_write(HOT, COLD)
    device = scene.ubi.new(scene.image, scene.base.path)
    starting = device.begin_start()
    scene.wait_at_the_fence(device, starting)
    scene.base.release()
    device.finish_start()
    # Whether the dead one's writes count is open; that they are over is not.
    assert read(device, HOT) == OLD
    write(device, HOT, NEW)
    write(device, COLD, NEW)
    assert (scene.landed(HOT), scene.landed(COLD)) == (NEW, NEW)
    assert device.status()["generation"] == 1


# Zero copy keeps the kernel's device, and so the guest's write, until that has landed.
@pytest.mark.data_paths("copy")
@pytest.mark.parametrize(
    ("first", "second"),
    [([], [LOCK, CLAIM]), ([RINGS_FD], [])],
    ids=["no-lock", "lock-not-in-the-rings"],
)
def test_without_the_lock_a_late_write_takes_an_acknowledged_one_away(
    scene: Scene, variant: Variant, first: list[tuple[str, str, str]],
    second: list[tuple[str, str, str]],
) -> None:
    for file, text, by in first + second:
        variant.replace(file, text, by, times=2 if (file, text, by) == RINGS_FD else 1)
    with variant.in_use() if first else contextlib.nullcontext():
        scene.kill_while_guests_write(HOT, COLD)
    with variant.in_use() if second else contextlib.nullcontext():
        device = scene.ubi.add(scene.image, scene.base.path)
    write(device, HOT, NEW)
    write(device, COLD, NEW)
    flush(device)
    assert (scene.landed(HOT), scene.landed(COLD)) == (NEW, NEW)
    scene.base.release()
    assert scene.landed(HOT) == OLD
    assert scene.landed(COLD) != NEW
    device.stop()


@pytest.mark.parametrize("same_name", [False, True], ids=["another-name", "same-name"])
def test_the_wait_has_a_limit(scene: Scene, same_name: bool) -> None:
    scene.kill_while_hydrating(COLD)
    before, landed = watch.inventory(), bytes(scene.base.content)
    name = {"name": scene.killed.name} if same_name else {}
    line = scene.ubi.refused(scene.image, scene.base.path, code=6, fence_timeout_s=0.5, **name)
    assert scene.base.path in line
    assert "after 0.5 s" in line
    assert not watch.leaks(before, set())
    assert bytes(scene.base.content) == landed
    assert not any(request.changes for request in scene.base.seen)
    scene.base.release()
    scene.killed.start()


# -- ublkc in the rings ----------------------------------------------------------------------------

@pytest.mark.data_paths("zero-copy", "copy")
def test_del_waits_until_the_writes_of_the_dead_have_landed(scene: Scene) -> None:
    scene.kill_while_hydrating(COLD)
    refused = scene.ubi.command("del", scene.killed.name, "--timeout", 0.5)
    assert (refused.code, refused.stdout) == (6, "")
    assert scene.killed.name in refused.stderr
    assert "after 0.5 s" in refused.stderr
    deleting = Background(lambda: scene.ubi.command("del", scene.killed.name))
    assert len(scene.base.held) == 1
    assert not deleting.done
    scene.base.release()
    assert deleting.result() == Outcome(0, f"{scene.killed.name} deleted\n", "")
    assert not os.path.exists(scene.killed.path)
    scene.killed.start().stop()


def test_without_ublkc_in_the_hydrators_ring_del_does_not_wait(
    scene: Scene, variant: Variant,
) -> None:
    variant.replace(*HYDRATORS_UBLKC)
    with variant.in_use():
        scene.kill_while_hydrating(COLD)
    assert scene.ubi.command("del", scene.killed.name, "--timeout", 5).code == 0
    assert len(scene.base.held) == 1
    scene.base.release()
    scene.killed.start().stop()


# -- a slow disk --------------------------------------------------------------------------------

def test_add_waits_for_a_slow_disk(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], mapper: Mapper,
) -> None:
    image = make_image(SIZE)
    base = mapper.map(make_base(SIZE, on="ram"))
    killed = ubi.add(image, base.path, stripe_size=STRIPE)
    write(killed, HOT, b"h" * BLOCK)
    flush(killed)
    base.delay(write_ms=4000, flush_ms=0)
    writers = [Background(lambda at=at: write(killed, at, OLD)) for at in (HOT, COLD)]
    until(lambda: delayed_writes(base) == 2, "both writes are in flight")
    killed.kill()
    assert delayed_writes(base) == 2

    device = ubi.new(image, base.path)
    running = device.begin_start()
    link = Path("/dev/ublk-ubi") / device.name
    waited = False
    while not running.done:
        live = link.exists()
        # Looked at after `live`: only a write of the dead one can be in flight by then.
        flying = delayed_writes(base)
        assert not (live and flying), f"live with {flying} writes in flight"
        waited |= flying > 0
    device.finish_start()
    assert waited
    # The dead disk lets its users go with its last write.
    assert all(writer.errno() == errno.EIO for writer in writers)
    assert read(device, HOT) == OLD
    assert read_metadata(base.path).extension.generation == 1
