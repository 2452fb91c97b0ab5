"""User-mode Linux as the guest: the machine's own files, read-only, under the lab's kernel."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kernel import Kernel
    from .plan import Plan
    from .system import Spec

MIB = 1 << 20

# RAM disks take memory as they are written; the 16 nbd devices of the default take time to make.
MODULE_SETTINGS = ("brd.rd_nr=8", "brd.rd_size=4194304", "nbd.nbds_max=4")


@dataclass(frozen=True)
class UserMode:
    """The lab's kernel and its init.c."""

    kernel: Kernel
    init: Path
    memory_is_private: bool = True
    private_bytes: int = 0
    has_terminal: bool = True

    def disk_nodes(self, count: int) -> list[str]:
        """Name the device nodes of the caller's disks."""
        return [f"/dev/ubd{chr(ord('a') + n)}" for n in range(count)]

    def write_files(self, private: str, plan: Plan) -> None:
        """Put init and plan where init.c finds the one beside the other."""
        shutil.copyfile(self.init, os.path.join(private, "init"))
        os.chmod(os.path.join(private, "init"), 0o755)
        Path(private, "plan").write_bytes(plan.encode())

    def command(self, spec: Spec) -> tuple[str, list[str]]:
        """Return the kernel, an ordinary program, and its command line."""
        lines = spec.lines
        return str(self.kernel.program), [
            "linux",
            f"mem={spec.memory // MIB}M",
            f"ncpus={spec.cpus}",
            "seccomp=on",
            "noreboot",
            f"uml_dir={spec.private}/uml",
            "umid=lab",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={spec.private}/init",
            "con=null",
            f"con0=null,fd:{lines.log}",
            "ssl=null",
            f"ssl0=null,fd:{lines.out}",
            f"ssl1=null,fd:{lines.err}",
            f"ssl2=fd:{lines.control_down},fd:{lines.control_up}",
            f"ssl3=fd:{lines.keys},fd:{lines.screen}",
            *(f"ubd{number}={path}" for number, path in enumerate(spec.disks)),
            *MODULE_SETTINGS,
        ]
