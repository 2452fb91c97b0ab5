"""A VM that has a disk over vhost-user-blk (support/vhost.py): qemu-system-x86_64, virtio-blk.

The VM boots Debian's packaged kernel with a root filesystem of Debian's packages: the lab's Debian
machine (tools/labkit/machine.py), whose disk is the image. Instead of an init it runs a shell
script, which it reads off a second disk; what the script says comes over the serial port.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import TYPE_CHECKING, Self

from labkit import machine
from labkit.kernel import cache_folder

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

MEMORY = "384M"
# SPDK polls, and takes a processor; it may end and come again, and no other server here does.
SPDK = bool(os.environ.get("UBLK_UBI_SPDK"))
BOOT_S = 230.0 if SPDK else 150.0
RECONNECT = ",reconnect=1" if SPDK else ""
MAKING_S = 600.0
SCRIPT_BYTES = 16 << 10
QEMU = "qemu-system-x86_64"


def debian() -> machine.DebianMachine | None:
    """The Debian machine whose disk and kernel a VM takes; None when nobody makes one."""
    cache = cache_folder()
    deadline = time.monotonic() + MAKING_S
    while not (made := machine.find(cache, "newest")) and machine.is_being_made(cache):
        assert time.monotonic() < deadline, f"the machine in {cache} is not ready in {MAKING_S:g} s"
        time.sleep(1)
    return made


class Vm:
    """A VM on the disk behind a vhost-user-blk socket; runs a script, and is ended when left."""

    def __init__(
        self, made: machine.DebianMachine, socket: Path, script: str, folder: Path,
    ) -> None:
        text = script.encode()
        assert len(text) < SCRIPT_BYTES
        (folder / "script").write_bytes(text.ljust(SCRIPT_BYTES, b"\n"))
        append = ("root=/dev/vda rw rootfstype=ext4 console=ttyS0 loglevel=4 panic=-1 "
                  "no_timer_check tsc=reliable init=/bin/sh -- /dev/vdb")
        self.console = ""
        self.read = 0              # of it, by wait_for
        self.process = subprocess.Popen(
            [
                QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", MEMORY,
                "-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on",
                "-numa", "node,memdev=memory",
                "-kernel", str(made.kernel), "-initrd", str(made.initrd), "-append", append,
                "-chardev", f"socket,id=vhost,path={socket}{RECONNECT}",
                "-device", "vhost-user-blk-pci,chardev=vhost",
                "-drive", f"file={folder}/script,format=raw,if=none,id=script,readonly=on",
                "-device", "virtio-blk-pci,drive=script", "-serial", "stdio",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        print(f"the VM's console:\n{self.console}")
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self) -> None:
        """Cut its power."""
        self.process.kill()
        self.process.wait(30)

    def wait_for(self, word: str, timeout_s: float = BOOT_S) -> str:
        """Read the console up to a line "VM: WORD…"; return what follows WORD."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._line(deadline, word)
            if line.startswith(f"VM: {word}"):
                return line.removeprefix(f"VM: {word}").strip()

    def wait_for_end(self, timeout_s: float = 60.0) -> None:
        """Wait until it has powered itself off."""
        assert self.process.stdout is not None
        self.console += self.process.stdout.read().decode(errors="replace")
        assert self.process.wait(timeout_s) == 0

    def _line(self, deadline: float, word: str) -> str:
        """Take the next whole line of the console."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while "\n" not in self.console[self.read:]:
            ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no word {word!r} from the VM; its console:\n{self.console}"
            data = os.read(fd, 4096)
            assert data, f"the VM ended before {word!r}; its console:\n{self.console}"
            self.console += data.decode(errors="replace")
        line, _, _ = self.console[self.read:].partition("\n")
        self.read += len(line) + 1
        return line.strip("\r")
