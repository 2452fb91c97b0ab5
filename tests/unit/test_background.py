"""Waiting for a device, look by look: what goes on, what ends it, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ublk_ubi import background
from ublk_ubi.background import watch
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.runtime import Device
from ublk_ubi.status import Hydration, Status, Stripes

if TYPE_CHECKING:
    from collections.abc import Iterator

ALIVE = Device(name="vm", folder="/f", alive=True, pid=1)
DEAD = Device(name="vm", folder="/f", alive=False, pid=1)


def live(state: str = "running", *, hydrated: int = 5, **changes: Any) -> Status:
    hydration = Hydration()
    hydration.state = state  # type: ignore[assignment]
    status = Status(name="vm", state="live", independent=False, hydration=hydration,
                    stripes=Stripes(10, hydrated, hydrated))
    for key, value in changes.items():
        setattr(status, key, value)
    return status


DONE = live("done", hydrated=10, independent=True)
DIED = Status(name="vm", state="dead", degraded="its daemon died")
MUTE = Status(name="vm", state="live", degraded="no daemon listens there")
STARTING = Status(name="vm", state="starting")


class World:
    """Plays looks at a device, one a second; the last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.looks: list[Status | None] = []
        monkeypatch.setattr(background, "time", self)
        monkeypatch.setattr(background.runtime, "refresh", lambda _: self.refresh())
        monkeypatch.setattr(background, "status_of", lambda *_: self.looks[0])

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if len(self.looks) > 1:
            self.looks.pop(0)

    def refresh(self) -> Device | None:
        if self.looks[0] is None:
            return None
        return DEAD if self.looks[0].state == "dead" else ALIVE

    def wait(self, *looks: Status | None, timeout_s: float | None = None) -> Iterator[Status]:
        self.looks = list(looks)
        return watch(ALIVE, timeout_s=timeout_s, interval_s=1.0)

    def problem(self, *looks: Status | None, timeout_s: float | None = 60.0) -> UbiError:
        with pytest.raises(UbiError) as caught:
            list(self.wait(*looks, timeout_s=timeout_s))
        return caught.value


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_until_independent(world: World) -> None:
    looks = [live(), live("waiting"), live("low-space"), live("done", hydrated=10), DONE]
    assert list(world.wait(*looks)) == looks


@pytest.mark.parametrize("state", ["off", "paused"])
def test_what_nobody_copies(world: World, state: str) -> None:
    found = world.problem(live(), live(state))
    assert (found.code, world.now) == (Exit.FAILED, 1001.0)
    assert "`ublk-ubi hydrate vm`" in found.message
    # All is copied, by reads and writes alone: the commit comes by itself.
    assert list(world.wait(live(state, hydrated=10), DONE))[-1] is DONE


def test_degraded(world: World) -> None:
    found = world.problem(live(), live(degraded="an fdatasync failed"))
    assert (found.code, found.message) == (3, "device vm: an fdatasync failed")


def test_independent_and_degraded(world: World) -> None:
    """It needs its image no more: that was the question."""
    done = live("done", hydrated=10, independent=True, degraded="an fdatasync failed")
    assert list(world.wait(done)) == [done]


def test_time_is_over(world: World) -> None:
    found = world.problem(live(), timeout_s=2.5)
    assert (found.code, world.now) == (Exit.TIMED_OUT, 1002.5)
    assert world.problem(live(), timeout_s=0.0).code == Exit.TIMED_OUT
    assert list(world.wait(DONE, timeout_s=0.0)) == [DONE]
    assert world.problem(live("paused"), timeout_s=0.0).code == Exit.FAILED


def test_deleted(world: World) -> None:
    found = world.problem(live(), None)
    assert found.code == Exit.NO_DEVICE
    assert "was deleted" in found.message


@pytest.mark.parametrize("gap", [[DIED, DIED, STARTING], [MUTE, DIED, DIED], [MUTE, MUTE, MUTE]])
def test_a_moment_without_a_daemon_is_an_upgrade(world: World, gap: list[Status]) -> None:
    seen = list(world.wait(live(), *gap, live(), DONE))
    assert [status.state for status in seen if status is not STARTING] == ["live"] * 3
    assert seen[-1] is DONE


@pytest.mark.parametrize("silent", [DIED, MUTE])
def test_a_longer_one_is_not(world: World, silent: Status) -> None:
    found = world.problem(live(), silent)
    assert (found.code, found.message) == (3, f"device vm: {silent.degraded}")
    assert 1004.0 <= world.now <= 1006.0


def test_a_gap_does_not_outlast_the_time(world: World) -> None:
    assert world.problem(live(), MUTE, timeout_s=2.0).code == Exit.TIMED_OUT
    assert world.problem(live(), DIED, timeout_s=2.0).code == Exit.DEGRADED


def test_starting_is_waited_for(world: World) -> None:
    assert list(world.wait(*[STARTING] * 9, DONE))[-1] is DONE
