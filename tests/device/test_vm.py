"""A real VM boots from a disk of ours, writes, loses its power: what it had fsynced is there."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.shell import until
from support.vhost import CACHE, KINDS, STORAGE_DAEMON, Server
from support.vm import QEMU, Vm, debian

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi

FILES, MORE_FILES = 4, 4
FILE_KIB = 768
HOME = "/srv/vm"
# What the VM takes its disk for: without a cache it never flushes.
WRITE_CACHE = {"qemu": "through", "aio": "back", "uring": "through"}

# Files of noise, each fsynced, and its folder too, before the script says so.
WRITE = f"""
export PATH=/usr/sbin:/usr/bin
mkdir -p {HOME}; cd {HOME}
echo "VM: up $(uname -r)"
echo "VM: cache $(cat /sys/block/vda/queue/write_cache)"
name=$1; n=0
while [ $n -lt $2 ]; do
    n=$((n+1))
    dd if=/dev/urandom of=$name$n bs=64k count={FILE_KIB // 64} conv=fsync 2>/dev/null ||
        echo "VM: error write"
    sync . || echo "VM: error sync"
    echo "VM: synced $name$n $(sha256sum <$name$n | cut -d' ' -f1)"
done
"""
# What went wrong with the disk, as the VM's own kernel tells it.
LOOK = """dmesg | grep -iE 'i/o error|aborting journal|ext4-fs error' | sed 's/^/VM: error /'
echo "VM: looked"
"""
POWER_OFF = """mount -o remount,ro / || echo "VM: error remount"
echo "VM: end"
systemctl poweroff -ff
"""


def script(name: str, files: int, rest: str) -> str:
    return f"set -- {name} {files}\n{WRITE}{rest}"


def sums(vm: Vm, count: int) -> dict[str, str]:
    """What the VM says it has fsynced: name → SHA-256."""
    return dict(vm.wait_for("synced").split() for _ in range(count))


def check(device: Device, folder: Path, expected: dict[str, str]) -> None:
    """Compare the disk's files, after its filesystem's replay of the journal, with the sums."""
    done = subprocess.run(["e2fsck", "-fp", device.node], check=False, capture_output=True)
    assert done.returncode in (0, 1), done.stdout.decode()
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", device.node, folder], check=True)
    try:
        found = {
            name: hashlib.sha256(Path(f"{folder}{HOME}/{name}").read_bytes()).hexdigest()
            for name in expected
        }
    finally:
        subprocess.run(["umount", folder], check=True)
    assert found == expected


@pytest.mark.skipif(not (shutil.which(QEMU) and shutil.which(STORAGE_DAEMON)),
                    reason="needs qemu-system-x86 and qemu-system-common")  # fmt: skip
@pytest.mark.limit(1000)
@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.cpus(1 if kind == "qemu" else 2)) for kind in KINDS
])
def test_a_vm_boots_writes_and_loses_its_power(
    ubi: Ubi, make_base: Callable[..., str], tmp_path: Path, kind: str,
) -> None:
    made = debian()
    if made is None:
        pytest.skip("no Debian machine: tools/lab --print machine makes it")
    size = made.root.stat().st_size
    device = ubi.add(made.root, make_base(size), size=size, recovery=True, cache=CACHE[kind])

    # The daemon is killed while the VM writes: it is brought back, and the VM sees nothing of it.
    killed = device.pid
    rest = LOOK + POWER_OFF
    files = FILES if kind == "qemu" else FILES + MORE_FILES
    with Server.start(kind, ubi, device, tmp_path) as server:
        with Vm(made, server.socket, script("first", files, rest), tmp_path) as vm:
            assert vm.wait_for("up")
            assert vm.wait_for("cache") == f"write {WRITE_CACHE[kind]}"
            fsynced = sums(vm, 1)
            os.kill(killed, signal.SIGKILL)
            fsynced |= sums(vm, FILES - 1)
            if kind != "qemu":
                # SPDK is, too: it is attached to again, and the VM's requests wait for that.
                server.kill()
                server.start_again()
                fsynced |= sums(vm, MORE_FILES)
            vm.wait_for("looked")
            vm.wait_for("end")
            vm.wait_for_end()
            assert "VM: error" not in vm.console
        server.stop()
    status = until(lambda: ubi.command("status", device.name, "--json").json(), "status", 30)
    assert status["pid"] != killed
    device.pid = status["pid"]
    if CACHE[kind] == "writeback":
        # The new daemon has seen one for each file, and for its folder, but the first.
        assert status["io"]["flush"]["count"] >= 2 * (FILES - 1)
    assert len(fsynced) == files
    check(device, tmp_path / "mnt", fsynced)

    # The power goes, for the VM and its host's processes alike, amid writing.
    with Server.start(kind, ubi, device, tmp_path) as server:
        with Vm(made, server.socket, script("second", 1000, ""), tmp_path) as vm:
            fsynced |= sums(vm, 3)
            vm.kill()
        server.kill()
    table = device.table()
    device.kill()
    assert ubi.command("del", device.name, "--force").code == 0
    # The table would be gone as well: what counts is what the base alone proves.
    assert table is not None
    table.unlink()
    device.start(force_stale=True)
    check(device, tmp_path / "mnt", fsynced)
