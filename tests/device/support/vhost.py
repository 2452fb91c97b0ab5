"""What gives a disk of ours to a VM over vhost-user-blk.

    qemu            /dev/ublk-ubi/NAME → qemu-storage-daemon
    uring, aio      /dev/ublk-ubi/NAME → that bdev of SPDK's `vhost`, by `ublk-ubi spdk attach`

SPDK's where UBLK_UBI_SPDK names its build/bin, else QEMU's.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from spdkpeer import Spdk

from support.shell import until
from ublk_ubi.errors import Exit

if TYPE_CHECKING:
    from types import TracebackType

    from support.device import Device, Ubi

STORAGE_DAEMON = "qemu-storage-daemon"
KINDS = ("uring", "aio") if os.environ.get("UBLK_UBI_SPDK") else ("qemu",)
CACHE = {"qemu": "writeback", "uring": "writethrough", "aio": "writeback"}
CONTROLLER = "vhost.0"


@dataclass
class Server:
    """A server that runs. `socket` is what a VM connects to."""

    kind: str
    ubi: Ubi
    device: Device
    folder: Path
    process: subprocess.Popen[bytes]
    socket: Path

    @classmethod
    def start(cls, kind: str, ubi: Ubi, device: Device, folder: Path) -> Self:
        """Serve the disk; returns when the socket is there."""
        process, socket = _begin(kind, ubi, device, folder)
        return cls(kind, ubi, device, folder, process, socket)

    def start_again(self) -> None:
        """Serve the disk once more, at the same socket, after `kill`."""
        self.process, socket = _begin(self.kind, self.ubi, self.device, self.folder)
        assert socket == self.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def stop(self) -> None:
        """Let it close the disk."""
        self.process.terminate()
        assert self.process.wait(60) == 0

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait(30)


def _begin(
    kind: str, ubi: Ubi, device: Device, folder: Path,
) -> tuple[subprocess.Popen[bytes], Path]:
    return _qemu(device, folder) if kind == "qemu" else _spdk(kind, ubi, device, folder)


def _qemu(device: Device, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    socket = folder / "vhost.sock"
    socket.unlink(missing_ok=True)
    node = f"driver=host_device,node-name=disk,filename={device.path},cache.direct=on,discard=unmap"
    # It tells the VM that there is no cache, and has to be told to make that true.
    export = (f"type=vhost-user-blk,id=export,node-name=disk,writable=on,writethrough=on,"
              f"addr.type=unix,addr.path={socket}")
    process = subprocess.Popen([STORAGE_DAEMON, "--blockdev", node, "--export", export])
    until(lambda: socket.exists() or process.poll() is not None, f"{socket}", 30.0)
    assert process.poll() is None, f"{STORAGE_DAEMON} ended: {process.returncode}"
    return process, socket


def _spdk(
    kind: str, ubi: Ubi, device: Device, folder: Path,
) -> tuple[subprocess.Popen[bytes], Path]:
    """Attach a disk to an SPDK that starts now; one that was attached before, as it was."""
    spdk = Spdk(folder).start()
    assert spdk.process is not None
    words = ["--socket", spdk.socket, "--vhost", CONTROLLER, "--bdev", kind]
    try:
        if (before := ubi.command("spdk", "status", device.name)).code == Exit.DEGRADED:
            assert f"SPDK has no bdev {device.name}" in before.stderr
            words = []
        done = ubi.command("spdk", "attach", device.name, *words)
        assert done.code == 0, done.stderr
    except BaseException:
        spdk.kill()
        raise
    return spdk.process, Path(done.stdout.strip())
