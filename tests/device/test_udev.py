"""The host's udev, for real: it leaves a disk's content alone, and the node to its owner."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.device import RUN_ROOT
from support.shell import run, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.device import Device, Ubi
    from support.images import Image
    from support.undo import Undo

MIB = 1 << 20
SIZE = 16 * MIB
RULES = Path("/run/udev/rules.d")
UDEVD = "/lib/systemd/systemd-udevd"
OWNER, GROUP, MODE = pwd.getpwnam("daemon").pw_uid, grp.getgrnam("games").gr_gid, 0o640
# What newer systemd does to every ublkb, and older to other kinds of disks.
PROBE = """\
SUBSYSTEM=="block", KERNEL=="ublkb*", ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}!="1", \\
  OPTIONS+="watch", IMPORT{builtin}="blkid"
"""


@pytest.fixture(autouse=True)
def udevd(undo: Undo, ubi: Ubi, tmp_path: Path) -> Iterator[None]:
    """A udevd with the rules that `systemd install` writes."""
    assert ubi.command("systemd", "install", "--root", tmp_path).code == 0
    RULES.mkdir(parents=True)
    undo.callback(shutil.rmtree, "/run/udev")
    for path in (tmp_path / "etc/udev/rules.d").iterdir():
        shutil.copy(path, RULES)
    (RULES / "60-probe.rules").write_text(PROBE)
    daemon = subprocess.Popen([UDEVD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(Path("/run/udev/control").exists, "udevd")
    yield
    for device in ubi.devices:
        if device.live:
            device.stop(force=True)
    run("udevadm", "settle")
    daemon.terminate()
    assert daemon.wait(30) == 0


@pytest.fixture
def device(ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str]) -> Device:
    device = ubi.add(
        make_image(SIZE), make_base(SIZE), recovery=True, owner="daemon:games", mode=MODE,
    )
    run("mkfs.ext4", "-q", "-F", "-U", "11111111-2222-3333-4444-555555555555", device.node)
    return device


def event(device: Device, action: str) -> dict[str, str]:
    """What udev knows of a disk after an event."""
    node = os.path.basename(device.node)
    run("udevadm", "trigger", f"--action={action}", f"/sys/class/block/{node}")
    return known(device)


def known(device: Device) -> dict[str, str]:
    run("udevadm", "settle")
    text = run("udevadm", "info", "--query=property", device.node)
    return dict(line.split("=", 1) for line in text.splitlines())


def owner(device: Device) -> tuple[int, int, int]:
    status = os.stat(device.node)
    return status.st_uid, status.st_gid, status.st_mode & 0o777


def test_a_guests_content_is_its_own(device: Device) -> None:
    for found in (known(device), event(device, "add"), event(device, "change")):
        assert found["UBLK_UBI_NAME"] == device.name
        assert not [key for key in found if key.startswith(("ID_FS", "ID_PART"))]
        assert {key: found[key] for key in (
            "UDISKS_IGNORE", "DM_MULTIPATH_DEVICE_PATH", "DM_UDEV_DISABLE_OTHER_RULES_FLAG",
            "UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG", "SYSTEMD_READY", "SYSTEMD_ALIAS",
        )} == {
            "UDISKS_IGNORE": "1", "DM_MULTIPATH_DEVICE_PATH": "0",
            "DM_UDEV_DISABLE_OTHER_RULES_FLAG": "1",
            "UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG": "1", "SYSTEMD_READY": "1",
            "SYSTEMD_ALIAS": device.path,
        }
    (RUN_ROOT / ".udev" / os.path.basename(device.node)).unlink()
    assert "ID_FS_TYPE" not in event(device, "change")  # udev remembers whose it is
    # Other ublk servers' disks are looked at, and so would ours be.
    assert event(device, "add")["ID_FS_TYPE"] == "ext4"


def test_the_node_stays_its_owners(device: Device) -> None:
    """Against udev's default rule, after events, writers, and a recovery."""
    wanted = (OWNER, GROUP, MODE)
    known(device)
    assert owner(device) == wanted
    for action in ("add", "change"):
        event(device, action)
        assert owner(device) == wanted
    old = device.pid
    device.kill()
    device.pid = until(lambda: new_daemon(device, old), "a new daemon", 30) or -1
    device.live = True
    event(device, "change")
    assert owner(device) == wanted
    record = RUN_ROOT / ".udev" / os.path.basename(device.node)
    assert record.exists()
    device.stop()
    assert not record.exists()


def new_daemon(device: Device, old: int) -> int | None:
    """The process that the watch has started instead of `old`."""
    try:
        pid = int((RUN_ROOT / device.name / "pid").read_text())
        return pid if pid != old and device.status()["state"] == "live" else None
    except (OSError, ValueError, AssertionError):
        return None
