"""What a daemon looks at once a second: its base's room, and whether its image is the same."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ublk_ubi import upkeep
from ublk_ubi.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMEOUT_S = 10.0


class Seen:
    """Plane, hydration and log in one: takes down what is said."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.space: list[tuple[int, int]] = []
        self.log: list[str] = []


class Plane:
    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.notify_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def lose_image(self) -> None:
        self.seen.lost.append("plane")


class Hydration:
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def lose_image(self) -> None:
        self.seen.lost.append("hydration")

    def see_space(self, free: int, total: int) -> None:
        self.seen.space.append((free, total))


class Image:
    path = "/golden.raw"

    def __init__(self) -> None:
        self.change: str | OSError | None = None
        self.looks = 0
        self.looked = threading.Event()

    def changed(self) -> str | None:
        self.looks += 1
        self.looked.set()
        if isinstance(self.change, OSError):
            raise self.change
        return self.change


class Base:
    def __init__(self, fd: int, *, is_block: bool = False) -> None:
        self.fd, self.is_block, self.size = fd, is_block, 5 << 30


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Base]:
    fd = os.open(tmp_path / "base", os.O_RDWR | os.O_CREAT)
    yield Base(fd)
    os.close(fd)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def make(seen: Seen, image: Any, base: Any) -> Upkeep:
    plane: Any = Plane(seen)
    hydration: Any = Hydration(seen)
    return Upkeep(plane, hydration, image, base, seen.log.append)


def test_what_a_base_takes_and_has_left(seen: Seen, base: Base) -> None:
    watching = make(seen, None, base)
    assert (watching.allocated, watching.free) == (None, None)
    os.ftruncate(base.fd, 1 << 30)
    os.pwrite(base.fd, bytes(1 << 20), 0)
    os.fsync(base.fd)
    watching.look_at_space()
    assert watching.allocated is not None
    assert 1 << 20 <= watching.allocated < 2 << 20
    space = os.fstatvfs(base.fd)
    assert watching.free == seen.space[0][0]
    assert seen.space[0][1] == space.f_blocks * space.f_frsize
    assert 0 < seen.space[0][0] <= space.f_bfree * space.f_frsize + (64 << 20)


def test_a_block_device_is_taken_whole(seen: Seen) -> None:
    watching = make(seen, None, Base(-1, is_block=True))
    watching.look_at_space()
    assert (watching.allocated, watching.free) == (5 << 30, None)
    assert seen.space == []


def test_a_base_that_does_not_tell_stops_nothing(seen: Seen) -> None:
    watching = make(seen, None, Base(-1))
    watching.look_at_space()
    assert (watching.allocated, watching.free) == (None, None)
    assert seen.space == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("its size is 5, not 6", "its size is 5, not 6"),
        (OSError(116, "Stale file handle"), "Stale file handle"),
    ],
)
def test_a_changed_image_is_lost_for_good(
    seen: Seen, base: Base, change: str | OSError, words: str,
) -> None:
    image = Image()
    watching = make(seen, image, base)
    watching.look_at_image()
    assert (watching.image_problem, seen.lost) == (None, [])
    image.change = change
    watching.look_at_image()
    assert seen.lost == ["plane", "hydration"]
    assert watching.image_problem == f"has changed since it was opened: {words}"
    assert seen.log == [f"image /golden.raw has changed since it was opened: {words}"]
    assert os.eventfd_read(watching._plane.notify_fd) == 1, "the daemon notes it for the next"
    image.change = None
    watching.look_at_image()
    assert watching.image_problem is not None
    assert len(seen.lost) == 2
    assert len(seen.log) == 1


def test_what_another_daemon_has_lost_is_lost(seen: Seen, base: Base) -> None:
    watching = make(seen, None, base)
    watching.lose_image("was another")
    assert seen.lost == ["plane", "hydration"]
    assert watching.image_problem == "was another"


def test_an_image_that_nobody_needs_may_change(seen: Seen, base: Base) -> None:
    image = Image()
    watching = make(seen, image, base)
    image.change = "gone"
    watching.forget_image()
    watching.look_at_image()
    assert (watching.image_problem, seen.lost, image.looks) == (None, [], 0)


def test_forgotten_while_it_is_looked_at(seen: Seen, base: Base) -> None:
    image = Image()
    watching = make(seen, image, base)

    def changed() -> str:
        watching.forget_image()
        return "its descriptor was closed"

    image.changed = changed  # type: ignore[method-assign]
    watching.look_at_image()
    assert (watching.image_problem, seen.lost, seen.log) == (None, [], [])


def test_it_looks_again_and_again_until_told_to_stop(
    seen: Seen, base: Base, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upkeep, "PERIOD_S", 0.01)
    image = Image()
    watching = make(seen, image, base)
    watching.start()
    for _ in range(3):
        assert image.looked.wait(TIMEOUT_S)
        image.looked.clear()
    monkeypatch.setattr(upkeep, "PERIOD_S", TIMEOUT_S)  # so long it waits for the thread's end
    watching.stop()
    assert not any(thread.name == "ubi-upkeep" for thread in threading.enumerate())
    assert seen.space


def test_a_look_that_does_not_come_back_holds_up_no_stop(
    seen: Seen, base: Base, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upkeep, "PERIOD_S", 0.01)
    image = Image()
    stuck, go_on = threading.Event(), threading.Event()

    def changed() -> str:
        stuck.set()
        assert go_on.wait(TIMEOUT_S)
        return "it is another one"

    image.changed = changed  # type: ignore[method-assign]
    watching = make(seen, image, base)
    watching.start()
    assert stuck.wait(TIMEOUT_S)
    watching.stop()
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "ubi-upkeep":
            thread.join(TIMEOUT_S)
    assert (watching.image_problem, seen.lost) == (None, [])
