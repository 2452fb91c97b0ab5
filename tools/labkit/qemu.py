"""A Debian machine in QEMU as the guest: packaged kernel, udev, and systemd unless it is left out.

The machine's disk is a pristine image (labkit/machine.py); what a guest writes to it is forgotten
with the guest, but not when it only restarts. It is emulated even where KVM is there, which may be
nested or broken: slow, and the same everywhere. The four lines to the relay are its serial ports.
With `icount` the guest's clock counts instructions, one a nanosecond, on one processor: figures
that depend neither on this machine's speed nor on what else it does.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LabError
from .plan import guest_environment, shared_paths

if TYPE_CHECKING:
    from .machine import DebianMachine
    from .plan import Plan
    from .system import Spec

MIB = 1 << 20
PROGRAM = "qemu-system-x86_64"
INSIDE = Path(__file__).with_name("inside.py")
OVERLAY_BYTES = 1 << 30  # what a guest may change of its root
# Processors take turns: with a thread each, QEMU before 8.1 may run a breakpoint that the kernel
# has taken out of its code again ("Oops: int3", one boot in some hundred; RHBZ 2216496).
ACCELERATOR = "tcg,thread=single"


@dataclass(frozen=True)
class Qemu:
    """Boots a machine of Debian's packages."""

    machine: DebianMachine
    systemd: bool = True
    icount: bool = False
    memory_is_private: bool = False
    private_bytes: int = OVERLAY_BYTES
    has_terminal: bool = False

    def disk_nodes(self, count: int) -> list[str]:
        """Name the device nodes of the caller's disks; the first disk is the root."""
        return [f"/dev/vd{chr(ord('b') + n)}" for n in range(count)]

    def write_files(self, private: str, plan: Plan) -> None:
        """Write what inside.py, the guest's side, is to do, and list the folders to be shared."""
        share = Path(private, "lab")
        share.mkdir()
        shutil.copyfile(INSIDE, share / INSIDE.name)
        shares = [(path, False) for path in shared_paths(plan) if path != plan.scratch]
        shares.append((plan.scratch, True))
        environment = guest_environment(os.environb, plan.scratch, plan.disks)
        environment.pop(b"DM_DISABLE_UDEV")  # there is one here
        text = json.dumps(
            {
                "shares": [
                    {"tag": f"lab{n}", "path": path, "writable": writable}
                    for n, (path, writable) in enumerate(sorted(shares))
                ],
                "cwd": plan.cwd,
                "environment": {
                    os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()
                },
                "command": plan.command,
            }
        )
        (share / "plan.json").write_text(text)

    def command(self, spec: Spec) -> tuple[str, list[str]]:
        """Return QEMU and its arguments."""
        program = shutil.which(PROGRAM)
        if program is None:
            raise LabError(f"no {PROGRAM} here: apt-get install qemu-system-x86")
        append = f"root=/dev/vda rw console=ttyS3 loglevel={4 if self.icount else 5} panic=-1"
        append += " no_timer_check tsc=reliable"
        append += " systemd.journald.forward_to_console=0 systemd.show_status=0"
        append += "" if self.systemd else " init=/usr/lib/lab/init"
        if self.icount:  # a wait for this machine's disk lasts minutes of that clock
            append += " sysctl.kernel.hung_task_timeout_secs=0"
        arguments = [
            PROGRAM,
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35", "-accel", ACCELERATOR, "-cpu", "max"),
            *("-smp", str(spec.cpus), "-m", f"{spec.memory // MIB}M"),
            *("-kernel", str(self.machine.kernel), "-initrd", str(self.machine.initrd)),
            *("-append", append),
            *("-device", "virtio-rng-pci"),
        ]
        if self.icount:
            arguments += ["-icount", "shift=0,sleep=off"]
        arguments += self._drives(spec.disks)
        arguments += self._shares(spec.private)
        lines = spec.lines
        for fd in (lines.out, lines.err, lines.control_up, lines.log):
            arguments += ["-serial", f"file:/proc/self/fd/{fd}"]
        return program, arguments

    def _drives(self, disks: list[str]) -> list[str]:
        words = []
        root = f"file={self.machine.root},snapshot=on"
        for n, drive in enumerate([root, *(f"file={path},cache=unsafe" for path in disks)]):
            words += ["-drive", f"{drive},format=raw,if=none,discard=unmap,id=d{n}"]
            words += ["-device", f"virtio-blk-pci,drive=d{n}"]
        return words

    def _shares(self, private: str) -> list[str]:
        lab = os.path.join(private, "lab")
        with open(os.path.join(lab, "plan.json")) as file:
            shares = json.load(file)["shares"]
        words = ["-virtfs", f"local,path={lab},mount_tag=lab,security_model=none,readonly=on"]
        for share in shares:
            mode = "off" if share["writable"] else "on"
            path = share["path"].replace(",", ",,")
            settings = f"security_model=none,readonly={mode},multidevs=remap"
            words += ["-virtfs", f"local,path={path},mount_tag={share['tag']},{settings}"]
        return words
