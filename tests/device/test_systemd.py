"""A real systemd: a host that goes down and is back; a disk outlives the service that adds it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from support.device import CHECKOUT
from support.shell import until
from support.systemd import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.images import Image
    from support.undo import Undo

pytestmark = pytest.mark.limit(600)
MIB = 1 << 20
NO_DEVICE = 4
SIZE = 8 * MIB
NAME = "vm1"
UNIT = f"ublk-ubi@{NAME}.service"
LINK = f"/dev/ublk-ubi/{NAME}"


@pytest.fixture
def host(undo: Undo, tmp_path: Path, make_image: Callable[..., Image]) -> Iterator[Host]:
    """A host with the disk's unit, which has been started."""
    host = Host(tmp_path, undo)
    (tmp_path / "units/ublk-ubi@.service.d").mkdir()
    (tmp_path / "units/ublk-ubi@.service.d/test.conf").write_text(
        # No journal is kept there.
        f"[Service]\nStandardError=append:{host.log}\n",
    )
    image = make_image(SIZE)  # whose filesystem a host that is booted by then would not see
    host.boot()
    installed = json.loads(host.ubi("systemd", "install", "--json").stdout)
    assert {file["action"] for file in installed["files"]} == {"written"}
    config = {"image": image.path, "base": f"{host.folder}/base/{NAME}.base"}
    (tmp_path / "config").write_text(json.dumps(config, default=str))
    host.do("cp", tmp_path / "config", f"/etc/ublk-ubi/{NAME}.json")
    host.do("systemctl", "daemon-reload")
    host.do("systemctl", "enable", "--now", UNIT)
    yield host
    host.ubi("del", "-a", "--force")
    host.cut_off()


def test_a_host_that_goes_down_and_comes_back(host: Host) -> None:
    """What is mounted from the disk is unmounted first, and its base's mount goes last."""
    host.do("mkfs.ext4", "-q", LINK)
    mounted = host.folder / "mounted"
    mounted.mkdir()
    host.do("mount", LINK, mounted)
    host.do("sh", "-c", f"echo kept >{mounted}/file")  # not flushed by anybody
    host.shut_down()
    host.boot()
    assert host.facts(UNIT)["ActiveState"] == "active"
    assert host.status(NAME)["degraded"] is None
    (upgraded,) = json.loads(host.ubi("upgrade", NAME, "--json").stdout)["upgraded"]
    assert upgraded["pid"] == int(host.facts(UNIT)["MainPID"])
    assert 0 < upgraded["pause_s"] < 10
    host.do("mount", LINK, mounted)
    assert host.do("cat", f"{mounted}/file") == "kept\n"
    host.do("umount", mounted)


# Reloads a unit, and stops the old daemon ($2) as it stands once the new one serves the queue: as a
# rule before it tells systemd of the new one.
RELOAD = """
import glob, os, signal, subprocess, sys
unit, old = sys.argv[1:]
reload = subprocess.Popen(["systemctl", "reload", unit])
serves = False
while not serves:
    for path in glob.glob("/proc/[0-9]*/task/*/comm"):
        try:
            with open(path) as file:
                serves |= file.read() == "ubi-queue-0\\n" and path.split("/")[2] != old
        except OSError:
            pass
try:
    os.kill(int(old), signal.SIGSTOP)
except ProcessLookupError:
    pass
sys.exit(reload.wait())
"""


def test_a_unit_that_is_stopped_amid_a_reload(host: Host) -> None:
    """What systemd asks of the old daemon, as it knows no other yet, is for the new one."""
    def is_stopped_in_time() -> bool:
        old = host.facts(UNIT)["MainPID"]
        host.do(sys.executable, "-c", RELOAD, UNIT, old)
        if host.facts(UNIT)["MainPID"] == old:
            return True
        host.run("kill", "-CONT", old)
        return False

    until(is_stopped_in_time, "a daemon that is stopped before it has told of the next", 120)
    host.do("systemctl", "stop", UNIT)  # which has it go on, too
    facts = host.facts(UNIT)
    assert (facts["ActiveState"], facts["Result"]) == ("inactive", "success"), host.console()
    assert host.ubi("status", NAME).code == NO_DEVICE
    host.do("systemctl", "start", UNIT)
    assert host.facts(UNIT)["ActiveState"] == "active"


def test_a_disk_that_a_service_adds_outlives_it(
    host: Host, make_image: Callable[..., Image],
) -> None:
    """So does its watch."""
    image, base = make_image(SIZE).path, f"{host.folder}/base/vm2.base"
    service = host.folder / "units/adder.service"
    add = f"{sys.executable} -m ublk_ubi add --image {image} --base {base} --name vm2"
    service.write_text(
        f"[Service]\nExecStart={add}\nRemainAfterExit=yes\nType=oneshot\n"
        f"Environment=PYTHONPATH={CHECKOUT}\n",
    )
    host.do("systemctl", "daemon-reload")
    host.do("systemctl", "start", "adder")
    host.do("systemctl", "stop", "adder")
    pid = host.status("vm2")["pid"]
    units = host.do("systemctl", "list-units", "--plain", "--no-legend", "--type=scope")
    assert "ublk-ubi-vm2-" in units
    assert "ublk-ubi-watch-" in units
    host.do("sh", "-c", f"kill -KILL {pid}")  # the program is another package's
    found = until(
        lambda: status if (status := host.status("vm2"))["state"] == "live" else None, "vm2", 60,
    )
    assert found["pid"] != pid
    assert host.ubi("del", "vm2").code == 0
