"""Shuts a daemon in, step by step, on its way up. What a kernel refuses is told, and done without.

    enter     one thread: image and base are open, all is judged. A root of its own (minimal_root);
              from here on no file of the host can be opened, no program run
    close     the disk is live: its helper is shut in as well (control_agent), /dev is narrowed to
              the disk's nodes, memory is locked, capabilities go, calls are filtered (seccomp)

Threads that serve requests have given up all capabilities by themselves by then (_threads.pyx).

The main thread keeps CAP_DAC_OVERRIDE: image and base may be another user's, and are opened again,
by their descriptors, when an upgrade has failed. Its helper keeps CAP_SYS_ADMIN for the control
device, and CAP_SYS_PTRACE to see who has the disk open.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

from ublk_ubi import capabilities, hygiene, minimal_root, runtime, seccomp
from ublk_ubi.links import device_root
from ublk_ubi.status import Confinement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk_ubi.control import Control
    from ublk_ubi.device_params import DevInfo

KEPT = ("CAP_DAC_OVERRIDE",)


class Sandbox:
    """One daemon's; it stays when the daemon leaves its disk and takes it back."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.state = Confinement()
        self._notice = notice
        self._entered = self._closed = False

    def enter(self) -> None:
        """Leave the host's files behind. Never raises."""
        if self._entered:
            return
        self._entered = True
        self.state.oom_score_adj = _oom_score_adj()
        # What glibc loads for a thread's early end (pthread_exit), and would not find any more.
        with contextlib.suppress(OSError):
            ctypes.CDLL("libgcc_s.so.1")
        # A folder of the disk's own is no place for it: it goes while this is mounted there.
        with self._told("a root of its own"):
            point = runtime.mount_point()
            minimal_root.enter(point, runtime.run_root(), device_root())
            self.state.root = True

    def close(self, control: Control, info: DevInfo) -> None:
        """Shut in what is live. Never raises."""
        if self._closed:
            return
        self._closed = True
        if self.state.root:
            with self._told("a narrow /dev"):
                minimal_root.narrow(device_root(), [info.char_path, info.disk_path])
        with self._told("a confined helper"):
            control.confine(join=self.state.root)
            self.state.helper = True
        with self._told("locked memory"):
            hygiene.lock_memory()
            self.state.memory_locked = True
        with self._told("fewer capabilities"):
            capabilities.reduce(KEPT)
            self.state.capabilities = list(KEPT)
        with self._told("a filter of system calls (seccomp)"):
            seccomp.install()
            self.state.seccomp = True

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._notice(f"this daemon goes on without {what}: {error.strerror}")


def _oom_score_adj() -> int | None:
    try:
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def reachable(fd: int) -> str:
    """Return a path by which a file can be opened again while this process lives.

    What is kept of the file holds no lock and no claim.
    """
    return f"/proc/self/fd/{os.open(f'/proc/self/fd/{fd}', os.O_PATH | os.O_CLOEXEC)}"
