"""What a service manager hears, on a socket as systemd has it."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import notify
from ublk_ubi.notify import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Listener:
    """The manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)

    def heard(self, timeout_s: float = 0.0) -> list[str]:
        """The next message, an assignment each; [] when there is none."""
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(65536).decode().split("\n")
        except (BlockingIOError, TimeoutError):
            return []

    def heard_with_files(self) -> tuple[bytes, list[int]]:
        """The next message, and the descriptors that came with it."""
        self._socket.settimeout(5.0)
        words, fds, _, _ = socket.recv_fds(self._socket, 65536, 8)
        return words, fds

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    address = str(tmp_path / "n") if request.param == "path" else f"@ubi-{os.getpid()}"
    found = Listener(address)
    yield found
    found.close()


@pytest.fixture
def manager(listener: Listener) -> Iterator[Manager]:
    found = Manager(listener.address)
    yield found
    found.close()


def test_the_words_of_a_life(listener: Listener, manager: Manager) -> None:
    assert manager.listens
    manager.ready("live: /dev/ublk-ubi/vm1")
    assert listener.heard() == ["READY=1", "STATUS=live: /dev/ublk-ubi/vm1"]
    manager.tell("MAINPID=7")
    assert listener.heard() == ["MAINPID=7"]
    manager.stopping("committing")
    assert listener.heard() == ["STOPPING=1", "STATUS=committing"]
    manager.look(lambda: "stopping, and nothing that anybody wants to know")
    assert manager.wait_s(None) is None
    assert listener.heard() == []


@pytest.mark.parametrize("listener", ["path"], indirect=True)
def test_a_barrier_ends_when_all_has_been_heard(listener: Listener, manager: Manager) -> None:
    manager.tell("MAINPID=7")
    waiting = threading.Thread(target=manager.barrier, args=(60.0,))
    waiting.start()
    assert listener.heard(5.0) == ["MAINPID=7"]
    words, fds = listener.heard_with_files()
    assert words == b"BARRIER=1"
    waiting.join(0.1)
    assert waiting.is_alive()
    os.close(*fds)
    waiting.join(5.0)
    assert not waiting.is_alive()
    manager.barrier(0.05)  # nobody hears it: an end all the same


def test_the_process_has_it_and_its_children_have_not(
    listener: Listener, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listener.address)
    manager = Manager.of_this_process()
    assert "NOTIFY_SOCKET" not in os.environ
    manager.tell("READY=1")
    manager.close()
    assert listener.heard() == ["READY=1"]


def test_a_status_is_told_when_it_is_news(
    listener: Listener, manager: Manager, monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []

    def line() -> str:
        looks.append("")
        return f"line {len(looks) // 3}"

    manager.look(line)
    assert listener.heard() == ["STATUS=line 0"]
    for _ in range(9):
        manager.look(line)  # the last look was a moment ago
    assert len(looks) == 1
    assert 0 < (manager.wait_s(None) or 0) <= notify.STATUS_PERIOD_S
    assert manager.wait_s(0.0) == 0.0
    monkeypatch.setattr(notify, "STATUS_PERIOD_S", 0.0)
    manager._look_at = 0.0
    for _ in range(5):
        manager.look(line)
    assert [listener.heard(), listener.heard(), listener.heard()] == [
        ["STATUS=line 1"], ["STATUS=line 2"], [],
    ]


def test_what_is_logged_is_a_status(listener: Listener, manager: Manager) -> None:
    logged: list[str] = []
    log = manager.hears(logged.append)
    log("waiting for the base's lock")
    assert logged == ["waiting for the base's lock"]
    assert listener.heard() == ["STATUS=waiting for the base's lock"]


def test_a_status_is_one_line_of_no_great_length(listener: Listener, manager: Manager) -> None:
    manager.status("a\nREADY=1\x1b" + "é" * 2000)
    (line,) = listener.heard()
    assert line.startswith("STATUS=a?READY=1?é")
    assert len(line.encode()) <= 1010


def test_a_long_start_asks_for_more_time_until_it_ends(
    listener: Listener, manager: Manager, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notify, "_BEAT_S", 0.01)
    with manager.patience():
        for _ in range(3):
            assert listener.heard(10) == ["EXTEND_TIMEOUT_USEC=30000000"]
    while listener.heard():
        pass
    assert listener.heard(0.1) == []
    assert threading.active_count() == 1


@pytest.mark.parametrize("address", [None, "", "relative", "/nonexistent/socket", "@nobody"])
def test_without_a_manager_nothing_is_said(address: str | None) -> None:
    manager = Manager(address)
    assert not manager.listens
    assert manager.wait_s(None) is None
    assert manager.wait_s(3.0) == 3.0
    with manager.patience():
        manager.ready("x")
        manager.look(lambda: pytest.fail("nobody asked"))


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    listener = Listener(str(tmp_path / "n"))
    manager = Manager(listener.address)
    started_at = time.monotonic()
    for number in range(5000):
        manager.status(f"line {number}")
    assert time.monotonic() - started_at < 10
    listener.close()
    manager.status("nobody is there any more")
    manager.close()
