"""Background hydration as the daemon steers it: what the hydrator is told, and what is said."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.hydration import Hydration, MinFree, as_told, parse_min_free
from ublk_ubi.options import DeviceOptions


class Plane:
    """Takes down what the hydrator is told."""

    def __init__(self) -> None:
        self.on: bool | None = None
        self.starts = 0
        self.rate: int | None = -1
        self.hydrated = False

    def hydrate(self, on: bool) -> None:
        self.on = on
        self.starts += on

    def set_rate(self, rate: int | None) -> None:
        self.rate = rate


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
def hydration(plane: Plane) -> Hydration:
    return make(plane)


def make(plane: Any, **options: Any) -> Hydration:
    return Hydration(plane, **{"rate": None, "min_free": "5%", **options})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5%", MinFree(0, 0.05)), ("0%", MinFree(0, 0.0)), (" 12.5% ", MinFree(0, 0.125)),
        ("10G", MinFree(10 << 30, 0.0)), ("0", MinFree(0, 0.0)), ("4096", MinFree(4096, 0.0)),
    ],
)
def test_how_much_is_left_alone(text: str, expected: MinFree) -> None:
    assert parse_min_free(text) == expected


@pytest.mark.parametrize("text", ["100%", "-1%", "%", "nan%", "inf%", "5%G", "5GB", "x", "", "-1"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UbiError) as caught:
        parse_min_free(text)
    assert caught.value.code == Exit.USAGE
    assert caught.value.message.startswith("--min-free")


def test_of_a_filesystem() -> None:
    assert parse_min_free("5%").of(1000) == 50
    assert parse_min_free("5%").of(0) == 0
    assert parse_min_free("3K").of(1000) == 3072


def test_nothing_begins_by_itself(plane: Plane, hydration: Hydration) -> None:
    assert plane.on is None
    assert plane.rate is None
    assert hydration.state(0) == "off"
    hydration.pause()
    assert hydration.state(0) == "off"


def test_start_pause_and_resume(plane: Plane, hydration: Hydration) -> None:
    hydration.start()
    assert (plane.on, hydration.state(0)) == (True, "running")
    hydration.pause()
    assert (plane.on, hydration.state(0)) == (False, "paused")
    hydration.start()
    assert (plane.on, hydration.state(7)) == (True, "waiting")


def test_what_failed_is_tried_at_once_when_told_again(plane: Plane, hydration: Hydration) -> None:
    hydration.start()
    hydration.start()
    assert plane.starts == 2


def test_rates(plane: Plane) -> None:
    hydration = make(plane, rate=1 << 20)
    assert plane.rate == 1 << 20
    hydration.set_rate(1 << 30)
    assert (plane.rate, hydration.rate) == (1 << 30, 1 << 30)
    hydration.set_rate(None)
    assert (plane.rate, hydration.rate) == (None, None)
    assert plane.on is None


def test_it_waits_for_room_and_goes_on(plane: Plane, hydration: Hydration) -> None:
    hydration.start()
    hydration.see_space(50, 1000)
    assert (plane.on, hydration.state(0)) == (True, "running")
    hydration.see_space(49, 1000)
    assert (plane.on, hydration.state(0)) == (False, "low-space")
    hydration.start()
    assert (plane.on, hydration.state(0)) == (False, "low-space")
    hydration.see_space(51, 1000)
    assert (plane.on, hydration.state(0)) == (True, "running")


def test_it_nears_what_is_left_alone_slowly(plane: Plane) -> None:
    """At full speed a second's copying, between two looks, was more than was to be left alone."""
    hydration = make(plane, min_free="1G")
    hydration.start()
    for free, pace in (
        (100 << 30, None), (5 << 30, 2 << 30), (2 << 30, 512 << 20), (1 << 30, 64 << 10),
        (9 << 30, 4 << 30), (100 << 30, None),
    ):
        hydration.see_space(free, 1 << 40)
        assert plane.rate == pace
    hydration.set_rate(1 << 20)
    hydration.see_space(2 << 30, 1 << 40)
    assert (plane.rate, hydration.rate) == (1 << 20, 1 << 20)
    hydration.set_rate(None)
    assert (plane.rate, hydration.rate) == (512 << 20, None)


def test_where_nothing_is_left_alone_it_goes_on_to_the_end(plane: Plane) -> None:
    hydration = make(plane, min_free="0")
    hydration.see_space(1 << 20, 1 << 40)
    assert plane.rate is None


def test_room_alone_starts_nothing(plane: Plane, hydration: Hydration) -> None:
    hydration.see_space(0, 1000)
    hydration.see_space(1000, 1000)
    assert not plane.on
    hydration.start()
    hydration.pause()
    hydration.see_space(0, 1000)
    hydration.see_space(1000, 1000)
    assert (plane.on, hydration.state(0)) == (False, "paused")


def test_looks_at_the_room_do_not_begin_anew(plane: Plane, hydration: Hydration) -> None:
    """A start resets the wait for the next pass: only a change may be one."""
    hydration.start()
    for _ in range(3):
        hydration.see_space(1000, 1000)
    assert plane.starts == 1


def test_without_the_image_it_is_over(plane: Plane, hydration: Hydration) -> None:
    hydration.start()
    hydration.lose_image()
    assert (plane.on, hydration.state(0)) == (False, "no-image")
    hydration.start()
    hydration.see_space(0, 1000)
    hydration.see_space(1000, 1000)
    assert (plane.on, hydration.state(0)) == (False, "no-image")


def test_done_is_done(plane: Plane, hydration: Hydration) -> None:
    plane.hydrated = True
    assert hydration.state(0) == "done"
    hydration.lose_image()
    hydration.pause()
    assert hydration.state(3) == "done"


def test_as_status_has_it(plane: Plane) -> None:
    hydration = make(plane, rate=5, min_free="1G")
    hydration.start()
    assert hydration.describe({"stripes": 3, "retry_in_s": 2}) == {
        "stripes": 3, "retry_in_s": 2, "state": "waiting", "rate": 5, "min_free": "1G",
    }


def test_what_the_last_daemon_was_told() -> None:
    options = DeviceOptions(base="/b", hydrate=True, rate=1 << 20, queues=2)
    last = msgspec.json.encode(DeviceOptions(base="/other", rate=1 << 30))
    assert as_told(options, last) == DeviceOptions(base="/b", rate=1 << 30, queues=2)
    for nothing in (b"", b"{", b"[]", b'{"base": 5}', b'{"of another version": 1}', b"\xff"):
        assert as_told(options, nothing) == options
