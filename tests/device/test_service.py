"""The unit's main process, with the test in the service manager's place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.device import CHECKOUT, RUN_ROOT
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.device import Ubi
    from support.images import Image
    from support.undo import Undo

MIB = 1 << 20
SIZE = 4 * MIB
BLOCK = 4096
NAME = "service"
SERVE = "import sys; from ublk_ubi import unit; sys.exit(unit.serve(*sys.argv[1:]))"


class Service:
    """ublk-ubi@service, and what it has told its manager."""

    def __init__(self, folder: Path, undo: Undo) -> None:
        self.folder = folder
        self.link = f"/dev/ublk-ubi/{NAME}"
        self.told: list[str] = []
        self.main: subprocess.Popen[bytes]
        self._undo = undo
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        undo.callback(self._socket.close)
        self._socket.bind(str(folder / "notify"))
        self._socket.settimeout(0.2)

    def start(self) -> None:
        """Start the main process and wait until it says that it is ready."""
        self.told.clear()
        self.main = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE, NAME, str(self.folder)], cwd="/",
            env=os.environ | {"NOTIFY_SOCKET": str(self.folder / "notify"),
                              "PYTHONPATH": str(CHECKOUT)},
        )
        self._undo.callback(self.end)
        until(lambda: self.has_told("READY=1"), "READY=1", 60)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.main.kill()
        self.main.wait(30)

    def has_told(self, words: str) -> bool:
        with contextlib.suppress(TimeoutError):
            while True:
                self.told += self._socket.recv(1 << 16).decode().split("\n")
                if any(words in line for line in self.told):
                    return True
        return any(words in line for line in self.told)

    def tells(self, words: str) -> None:
        until(lambda: self.has_told(words), f"{words!r}, not only {self.told}", 30)


@pytest.fixture
def service(
    undo: Undo, ubi: Ubi, tmp_path: Path, make_image: Callable[..., Image],
    make_base: Callable[..., str],
) -> Iterator[Service]:
    found = Service(tmp_path, undo)
    config = {"image": str(make_image(SIZE).path), "base": make_base(SIZE)}
    (tmp_path / f"{NAME}.json").write_text(json.dumps(config))
    yield found
    ubi.command("del", NAME, "--force", "--if-exists")
    found.end()
    for table in (RUN_ROOT / ".tables").glob("*"):
        table.unlink()


@pytest.fixture
def guest(service: Service) -> Iterator[int]:
    """The disk, live and open."""
    service.start()
    fd = os.open(service.link, os.O_RDWR | os.O_SYNC)
    yield fd
    with contextlib.suppress(OSError):
        os.close(fd)


def test_a_dead_daemons_disk_is_taken_over_by_the_next(service: Service, guest: int) -> None:
    service.tells(f"STATUS=live {service.link} → /dev/ublkb")
    os.pwrite(guest, b"a" * BLOCK, 0)
    before = os.stat(service.link).st_rdev, os.readlink(service.link)
    for _ in range(2):
        service.main.kill()
        service.main.wait(30)
        service.start()
        assert (os.stat(service.link).st_rdev, os.readlink(service.link)) == before
        assert os.pread(guest, BLOCK, 0) == b"a" * BLOCK


def test_a_stop_leaves_an_open_disk_and_says_how_it_goes_on(
    ubi: Ubi, service: Service, guest: int,
) -> None:
    os.pwrite(guest, b"b" * BLOCK, 0)
    service.main.send_signal(signal.SIGTERM)
    assert service.main.wait(30) == 0
    service.tells("STOPPING=1")
    assert f"`ublk-ubi recover {NAME}`" in service.told[-1]
    assert ubi.command("status", NAME).code == 3
    service.start()
    assert os.pread(guest, BLOCK, 0) == b"b" * BLOCK


def test_a_stop_deletes_a_disk_that_nobody_uses(service: Service, guest: int) -> None:
    node = os.path.realpath(service.link)
    os.close(guest)
    service.main.send_signal(signal.SIGTERM)
    assert service.main.wait(30) == 0
    assert not os.path.lexists(service.link)
    assert not Path(node).exists()
    assert not (RUN_ROOT / NAME).exists()
    service.tells("STATUS=the disk is gone")


def test_a_base_is_what_a_link_to_it_means(ubi: Ubi, service: Service) -> None:
    """As /dev/vg/lv is one, which a live daemon cannot follow any more."""
    config = service.folder / f"{NAME}.json"
    values = json.loads(config.read_text())
    (service.folder / "link").symlink_to(os.path.dirname(values["base"]))
    config.write_text(json.dumps(values | {"base": str(service.folder / "link/base")}))
    service.start()
    assert ubi.command("status", NAME, "--json").json()["base"] == os.path.realpath(values["base"])
    with open(service.link, "r+b", buffering=0):
        service.main.send_signal(signal.SIGTERM)
        service.main.wait(30)
        service.start()


def test_when_the_host_goes_down_users_are_waited_for(service: Service, guest: int) -> None:
    """Else what is mounted could not be unmounted any more."""
    service.main.send_signal(signal.SIGPWR)
    service.main.send_signal(signal.SIGTERM)  # systemd's, right after
    service.tells("waiting until nobody uses the disk")
    os.pwrite(guest, b"c" * BLOCK, 0)
    os.fsync(guest)
    assert service.main.poll() is None
    os.close(guest)
    assert service.main.wait(30) == 0
    assert not os.path.lexists(service.link)
