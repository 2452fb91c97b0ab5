"""What a daemon says of errors: the first at once, then a count."""

from __future__ import annotations

from ublk_ubi.faults import QUIET_S, Faults, errors_of


class Seen:
    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.faults = Faults(self.lines.append, lambda: self.now)

    def look(self, degraded: str | None = None, **errors: int) -> None:
        self.now += 1
        self.faults.look(errors, degraded)


def test_an_episode_takes_two_lines() -> None:
    seen = Seen()
    seen.look(reads=0, writes=0)
    for errors in range(1, 50):
        seen.look(reads=errors, writes=0)
    assert seen.lines == ["reads fail"]
    for _ in range(int(QUIET_S) + 1):
        seen.look(reads=49, writes=0)
    assert seen.lines == ["reads fail", "reads have not failed for 10 s; 49 did"]
    seen.look(reads=50, writes=1)
    assert seen.lines[2:] == ["reads fail", "writes fail"]


def test_errors_of_before_the_first_look_are_told() -> None:
    seen = Seen()
    seen.look(reads=3)
    assert seen.lines == ["reads fail"]


def test_degraded_is_told_when_it_changes() -> None:
    seen = Seen()
    for degraded in (None, "an fdatasync failed", "an fdatasync failed", None, "the image is gone"):
        seen.look(degraded)
    assert seen.lines == ["degraded: an fdatasync failed", "degraded: the image is gone"]


def test_what_is_counted() -> None:
    io = {"read": {"errors": 1}, "write_zeroes": {"errors": 2}}
    counters = {"hydration": {"errors": 3}, "commit": {"errors": 4}}
    assert errors_of(io, counters) == {
        "read requests": 1, "write zeroes requests": 2, "copies of stripes to the base": 3,
        "commits to the base": 4,
    }
