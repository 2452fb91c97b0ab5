"""The watch: whom it brings back, how often, and when it has nothing to do any more."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import runtime, watch
from ublk_ubi.watch import MOST_DEATHS, WINDOW_S, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Host:
    """Devices in a folder of their own, a clock, and what the watch does."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.begun: list[list[str]] = []
        self.ended = True              # the processes that it has begun
        self.lines: list[str] = []
        self.watch = Watch(self.lines.append)

    def popen(self, words: list[str], **_: object) -> Host:
        self.begun.append(words)
        return self

    def poll(self) -> int | None:
        """Of a process that was begun."""
        return 0 if self.ended else None

    def die(self, name: str = "vm", *, left: bool = False, recoverable: bool = True,
            unit: str | None = None) -> None:
        """A daemon has had the device, and has not any more."""
        claim = runtime.claim(name)
        claim.write_state(runtime.State(
            image="/i", base="/b", id=3, recoverable=recoverable, left=left, unit=unit,
        ))
        claim.abandon()

    def trouble(self, name: str = "vm") -> str | None:
        [device] = [device for device in runtime.all_devices() if device.name == name]
        return device.trouble


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    made = Host()
    monkeypatch.setattr(watch.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(watch.subprocess, "Popen", made.popen)
    yield made
    for _, fd in made.watch._processes.values():
        os.close(fd)


def test_a_daemon_that_died_is_followed_by_another(host: Host) -> None:
    host.die()
    assert host.watch.look()
    assert host.begun == [[sys.executable, "-P", "-m", "ublk_ubi", "recover", "vm"]]
    assert f"vm: its daemon (process {os.getpid()}) died; bringing it back" in host.lines


def test_while_it_is_at_it_nobody_else_is(host: Host) -> None:
    host.die()
    host.ended = False
    for _ in range(MOST_DEATHS + 2):
        host.watch.look()
    assert len(host.begun) == 1
    assert host.trouble() is None


@pytest.mark.parametrize("what", ["left", "plain", "unit"])
def test_whom_it_leaves_alone(host: Host, what: str) -> None:
    """One that left on purpose, one whose disk is gone, one that systemd brings back."""
    host.die(left=what == "left", recoverable=what != "plain",
             unit="ublk-ubi@vm.service" if what == "unit" else None)
    assert host.watch.look() is (what == "left")
    assert host.begun == []


def test_deaths_in_a_row_end_it(host: Host) -> None:
    host.die()
    for _ in range(MOST_DEATHS + 3):
        host.watch.look()
        host.now += 1
    assert len(host.begun) == MOST_DEATHS - 1
    trouble = host.trouble()
    assert trouble is not None
    assert f"died {MOST_DEATHS} times within {WINDOW_S:g} s" in trouble
    assert "ublk-ubi recover vm" in trouble
    assert "ublk-ubi del --force vm" in trouble
    assert sum(trouble in line for line in host.lines) == 1


def test_deaths_now_and_then_do_not(host: Host) -> None:
    host.die()
    for _ in range(4 * MOST_DEATHS):
        host.watch.look()
        host.now += WINDOW_S / (MOST_DEATHS - 1) + 1
    assert len(host.begun) == 4 * MOST_DEATHS
    assert host.trouble() is None


def test_each_disk_counts_for_itself(host: Host) -> None:
    for name in ("a", "b"):
        host.die(name)
    for _ in range(MOST_DEATHS - 1):
        host.watch.look()
    assert len(host.begun) == 2 * (MOST_DEATHS - 1)
    assert host.trouble("a") is host.trouble("b") is None


def test_an_operator_can_have_it_counted_anew(host: Host) -> None:
    host.die()
    for _ in range(MOST_DEATHS):
        host.watch.look()
    [device] = runtime.all_devices()
    runtime.clear_trouble(device)
    host.watch.look()
    assert len(host.begun) == MOST_DEATHS
    assert host.trouble() is None


def test_the_last_words_are_quoted(host: Host, tmp_path: Path) -> None:
    host.die()
    log = tmp_path / "run/vm/log"
    log.write_bytes(b"first\n" + b"x" * 10_000 + b"\nno room on the base\n\n")
    for _ in range(MOST_DEATHS):
        host.watch.look()
    assert "the last time saying: no room on the base;" in (host.trouble() or "")


@pytest.mark.parametrize("what", ["none", "empty", "fifo", "link"])
def test_a_log_that_is_none_is_no_error(host: Host, tmp_path: Path, what: str) -> None:
    host.die()
    log = tmp_path / "run/vm/log"
    if what == "empty":
        log.touch()
    elif what == "fifo":
        os.mkfifo(log)
    elif what == "link":
        log.symlink_to("/etc/hostname")
    [device] = runtime.all_devices()
    assert watch.last_line(device) == "nothing"


def test_there_is_one_watch(host: Host) -> None:
    first = watch.lock()
    assert first is not None
    assert watch.lock() is None
    os.close(first)
    again = watch.lock()
    assert again is not None
    os.close(again)


def test_it_ends_when_there_is_nothing_to_watch(
    host: Host, monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    def wait(_self: Watch) -> None:
        waits.append(host.now)
        host.now += 1.0
        assert len(waits) < 100

    monkeypatch.setattr(Watch, "_wait", wait)
    host.watch.run(linger_s=5.0)
    assert 5 <= len(waits) <= 7
