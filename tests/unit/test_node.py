"""The device's node is who was asked for, whatever udev does to it first."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import node
from ublk_ubi.config import resolve_owner
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 65534
LATE_S = 0.2


def message(path: str, **properties: str) -> bytes:
    """What udev says when it is done (systemd's sd-device/device-monitor.c)."""
    words = {"ACTION": "add", "DEVNAME": path, "SUBSYSTEM": "block"} | properties
    body = b"".join(f"{key}={value}".encode() + b"\0" for key, value in words.items())
    head = struct.pack(">8sI", b"libudev\0", 0xFEEDCAFE) + struct.pack("=III", 40, 40, len(body))
    return head + bytes(16) + body


def say(*messages: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15) as speaker:
        for words in messages:
            speaker.sendto(words, (0, 2))


@pytest.fixture
def device(tmp_path: Path) -> str:
    path = tmp_path / "ublkb7"
    path.touch(mode=0o600)
    return str(path)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """What tells that there is a udev."""
    path = tmp_path / "control"
    path.touch()
    return path


def found(path: str) -> tuple[int, int, int]:
    seen = os.stat(path)
    return seen.st_uid, seen.st_gid, seen.st_mode & 0o777


def udev_comes(path: str, sender: threading.Event) -> threading.Thread:
    """udev's own rule, some time after the device has come; and word of others before."""
    def work() -> None:
        sender.wait()
        time.sleep(LATE_S)
        say(message(f"{path}0"), message("/dev/sda"), b"add@/devices/virtual/block/ublkb7\0")
        os.chown(path, 0, 6)
        os.chmod(path, 0o660)
        say(message(path))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize(("owner", "mode", "expected"), [
    (f"{NOBODY}:{NOBODY}", 0o640, (NOBODY, NOBODY, 0o640)),
    (f":{NOBODY}", 0o660, (0, NOBODY, 0o660)),
    (None, 0o600, (0, 0, 0o600)),
])
def test_the_last_word_is_ours(
    device: str, control: Path, owner: str | None, mode: int, expected: tuple[int, int, int],
) -> None:
    begun = threading.Event()
    thread = udev_comes(device, begun)
    with node.Udev(str(control)) as udev:
        begun.set()
        node.give(device, resolve_owner(owner) if owner else (-1, -1), mode, udev)
    thread.join()
    assert found(device)[::2] == expected[::2]
    if owner is not None:
        assert found(device) == expected


def test_who_asks_for_nothing_does_not_wait(device: str, control: Path) -> None:
    with node.Udev(str(control)) as udev:
        began = time.monotonic()
        node.give(device, (-1, -1), 0o660, udev)
    assert time.monotonic() - began < node.WAIT_S / 2
    assert found(device) == (0, 0, 0o660)


def test_without_a_udev_nobody_waits(device: str, tmp_path: Path) -> None:
    with node.Udev(str(tmp_path / "none")) as udev:
        began = time.monotonic()
        node.give(device, (NOBODY, -1), 0o600, udev)
    assert time.monotonic() - began < node.WAIT_S / 2
    assert found(device) == (NOBODY, 0, 0o600)


def test_a_udev_that_does_not_answer_is_not_waited_for_for_ever(
    device: str, control: Path,
) -> None:
    with node.Udev(str(control)) as udev:
        udev.wait_for(device, 0.05)


@pytest.mark.parametrize("words", [
    b"", b"libudev\0", message("/dev/ublkb1"), message("/dev/ublkb"), message("/dev/ublkb70"),
    message("/dev/ublkb7")[:40], b"x" + message("/dev/ublkb7")[1:],
    message("/dev/sda", DEVLINKS="/dev/ublkb7"),
])
def test_words_about_something_else(words: bytes) -> None:
    assert not node.is_about(words, "/dev/ublkb7")
    assert node.is_about(message("/dev/ublkb7"), "/dev/ublkb7")


def test_a_node_that_is_gone(tmp_path: Path) -> None:
    with node.Udev(str(tmp_path / "none")) as udev, pytest.raises(UbiError) as caught:
        node.give(str(tmp_path / "ublkb9"), (-1, -1), 0o600, udev)
    assert os.strerror(errno.ENOENT) in str(caught.value)
