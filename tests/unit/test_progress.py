"""How far background hydration is, drawn: speed, time left, and lines that fit."""

from __future__ import annotations

import io

import pytest

from ublk_ubi.cli import progress
from ublk_ubi.cli.progress import Bar, Lines, Speed, bar_line, facts
from ublk_ubi.status import Hydration, Space, Status, Stripes

MIB = 1 << 20


def status(done: int = 432, total: int = 1000, **changes: object) -> Status:
    hydration = Hydration(state="running", min_free="5%")
    for key, value in changes.items():
        setattr(hydration, key, value)
    return Status(
        name="vm", state="live", independent=False, hydration=hydration,
        stripes=Stripes(total, done, done),
        space=Space(allocated=done * MIB, free=1 << 40, hydrated=done * MIB,
                    needed=(total - done) * MIB),
    )


def speed(*looks: tuple[float, int]) -> Speed:
    found = Speed()
    for now_s, done in looks:
        found.add(now_s, done)
    return found


def test_speed() -> None:
    assert speed().rate is None
    assert speed((1.0, 5)).rate is None
    assert speed((1.0, 5), (1.0, 9)).rate is None
    assert speed((1.0, 100), (3.0, 500)).rate == 200
    assert speed((1.0, 100), (3.0, 100)).rate == 0


def test_speed_is_that_of_the_last_seconds() -> None:
    looks = [(float(second), 0) for second in range(100)]
    assert speed(*looks, (100.0, 500)).rate == pytest.approx(100, rel=0.3)
    steady = speed(*((second / 4, second * 25) for second in range(1000)))
    assert steady.rate == pytest.approx(100)
    assert len(steady._seen) < 30  # bounded, however long it takes


def test_facts() -> None:
    assert facts(status(), speed()) == ["43.2 %", "432 MiB of 1000 MiB"]
    assert facts(status(), speed((0.0, 0), (2.0, 142 * MIB))) == [
        "43.2 %", "432 MiB of 1000 MiB", "71 MiB/s", "8 s left",
    ]
    assert facts(status(), speed((0.0, 7), (2.0, 7))) == [
        "43.2 %", "432 MiB of 1000 MiB", "0 B/s",
    ]
    assert facts(status(done=1000), speed((0.0, 0), (1.0, MIB)))[2:] == ["commits"]
    assert facts(Status(name="vm", state="starting"), speed()) == ["starting"]


def test_facts_say_what_it_waits_for() -> None:
    fast = speed((0.0, 0), (2.0, 142 * MIB))
    waiting = facts(status(state="waiting", failed=2, last_error=28, retry_in_s=4), fast)
    assert waiting[2:] == [
        "retries in 4 s: No space left on device",
    ]
    low = facts(status(state="low-space"), fast)
    assert low[2:] == ["no room: 1 TiB free, --min-free is 5%"]
    # All is copied, whatever failed on the way.
    assert facts(status(1000, state="waiting", failed=2, last_error=28), fast)[2:] == ["commits"]
    # Between two passes without a failure there is nothing to tell.
    assert facts(status(state="waiting", retry_in_s=1), fast)[2:] == ["71 MiB/s", "8 s left"]


@pytest.mark.parametrize("waits", [
    {"state": "low-space", "min_free": "12.5%"},
    {"state": "waiting", "failed": 12, "last_error": 28, "retry_in_s": 64},
])
def test_what_it_waits_for_is_not_cut_off(waits: dict[str, object]) -> None:
    """It was, in 80 columns: "waits for room: 0 B free on the base's filesyste"."""
    found = status(**waits)
    line = bar_line(found, speed(), 80)
    assert line.endswith(facts(found, speed())[-1])


@pytest.mark.parametrize("columns", [1, 10, 20, 40, 60, 80, 100, 300])
@pytest.mark.parametrize("done", [0, 1, 432, 999, 1000])
def test_lines_fit(columns: int, done: int) -> None:
    line = bar_line(status(done), speed((0.0, 0), (2.0, 142 * MIB)), columns)
    assert len(line) < columns
    if columns >= 80:
        bar = line[line.index("[") + 1:line.index("]")]
        assert len(bar) >= 10
        assert bar == "#" * (len(bar) * done // 1000) + "·" * (len(bar) - len(bar) * done // 1000)
    else:
        assert line.startswith("vm"[:columns - 1])


def test_a_shorter_line_leaves_nothing_of_a_longer_one() -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar.show(status(state="waiting", failed=2, last_error=28, retry_in_s=4), speed())
    bar.show(status(), speed())
    bar.end()
    first, second = stream.getvalue().removeprefix("\r").removesuffix("\n").split("\r")
    assert len(second) >= len(first)
    assert second.rstrip().endswith("432 MiB of 1000 MiB")


def test_nothing_drawn_needs_no_end() -> None:
    stream = io.StringIO()
    Bar(stream).end()
    assert stream.getvalue() == ""


def test_lines_come_with_news_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    lines = Lines(stream)
    for _ in range(3):
        lines.show(status(), speed())
    lines.show(status(state="low-space"), speed())
    now += progress.LINE_S
    lines.show(status(500, state="low-space"), speed())
    lines.show(status(500, state="low-space"), speed())
    done = status(1000, state="done")
    done.independent = True
    lines.show(done, speed())
    assert [line.partition(" %")[0] for line in stream.getvalue().splitlines()] == [
        "vm: 43.2", "vm: 43.2", "vm: 50",
    ]
