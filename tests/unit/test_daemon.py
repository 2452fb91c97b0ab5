"""The daemon's main thread on the way up: signals at bad moments, a device that is of no use."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from ublk_ubi import daemon
from ublk_ubi.errors import UbiError
from ublk_ubi.options import DeviceOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPTIONS = DeviceOptions(image="/i", base="/b")


class FakeSession:
    """Does in `start` what the test says; remembers what was asked of it."""

    during_start: Callable[[FakeSession], None]
    made: FakeSession

    def __init__(self, _options: DeviceOptions, notice: object, control: object) -> None:
        self.calls: list[str] = []
        self.is_live = False
        self.warnings: list[str] = []
        FakeSession.made = self

    def start(self, *, recover: bool) -> None:
        assert not recover
        FakeSession.during_start(self)

    def take_back(self) -> None:
        self.calls.append("take_back")

    def __getattr__(self, name: str) -> Any:  # claim, info, link, size: what `ready` is told
        return FakeSession.Anything()

    class Anything:
        def __getattr__(self, name: str) -> Any:
            return FakeSession.Anything()

        def __call__(self) -> Any:
            return None


class FakeDaemon:
    """Counts the signals that reach it, as the real one does in its loop."""

    seen: list[int]
    left = False

    def __init__(self, _session: FakeSession, _manager: object) -> None:
        FakeDaemon.seen = []
        for number in daemon.ENDING:
            signal.signal(number, lambda number, _frame: FakeDaemon.seen.append(number))

    def serve(self) -> int:
        return 7


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in daemon.ENDING}
    monkeypatch.setattr(daemon, "Session", FakeSession)
    monkeypatch.setattr(daemon, "Daemon", FakeDaemon)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_does_not_interrupt_the_undoing(
    monkeypatch: pytest.MonkeyPatch, first: signal.Signals, second: signal.Signals,
) -> None:
    undone: list[bool] = []

    def start(_session: FakeSession) -> None:
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(second)
            undone.append(True)

    monkeypatch.setattr(FakeSession, "during_start", start, raising=False)
    with pytest.raises(UbiError, match=f"ended by {first.name} before the device was live"):
        daemon.run(OPTIONS, lambda _answer: None)
    assert undone == [True]


def test_a_signal_as_it_goes_live_is_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is nothing to undo any more, and a disk to stop."""
    def start(session: FakeSession) -> None:
        session.is_live = True
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(FakeSession, "during_start", start, raising=False)
    assert daemon.run(OPTIONS, lambda _answer: None) == 7
    assert FakeDaemon.seen == [signal.SIGTERM]
    assert FakeSession.made.calls == []


def test_a_device_that_nobody_can_be_told_of_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """`add --foreground` whose output is full or closed."""
    def full(_answer: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FakeSession, "during_start", lambda _session: None, raising=False)
    with pytest.raises(OSError, match="No space left"):
        daemon.run(OPTIONS, full)
    assert FakeSession.made.calls == ["take_back"]


def test_a_log_without_room_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /run is no reason for a disk to go."""
    class Full:
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.stderr", Full())
    daemon.log("a disk is served all the same")
