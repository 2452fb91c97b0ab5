"""Looks after each test: what it has left behind, and what the kernel complained about."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

# What no test of ours may cause, not even one that breaks disks on purpose.
ALARMS = re.compile(
    r"BUG:|WARNING:|Oops|Call Trace|Kernel panic|general protection|refcount_t:|UBSAN|KASAN|"
    r"blocked for more than|hung task|soft lockup|rcu.*stall|list_(add|del) corruption|"
    r"scheduling while atomic|possible recursive locking",
)
SETTLE_S = 10.0                    # a daemon lingers for a moment, to be heard


class KernelLog:
    """The kernel's messages from now on."""

    def __init__(self) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> list[str]:
        """Lines since the last call."""
        lines: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                lines.append("(messages were overwritten)")
                continue
            lines.append(record.decode(errors="replace").partition(";")[2].splitlines()[0])
        return lines

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def alarms(lines: list[str]) -> list[str]:
    """Those lines that say that something is broken, each with a few that follow."""
    found: list[str] = []
    for number, line in enumerate(lines):
        if ALARMS.search(line):
            found += lines[number : number + 30]
            break
    return found


def inventory() -> set[str]:
    """Everything of the kinds that tests make: to be the same before and after one."""
    things = {f"/dev/{entry}" for entry in os.listdir("/dev") if entry.startswith("ublk")}
    things |= _entries("/dev/ublk-ubi") | _entries("/dev/mapper") | _entries("/run/ublk-ubi")
    things |= _entries("/run/ublk-ubi/.udev")
    things |= _entries("/run/ublk-ubi/.tables") | _entries("/sys/kernel/config/nullb")
    attached = Path("/sys/block").glob("loop*/loop/backing_file")
    things |= {f"/dev/{path.parents[1].name}" for path in attached}
    things |= {f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines()}
    things |= _disks()
    things |= _processes()
    return things - {
        "/dev/ublk-ubi", "/run/ublk-ubi/.tables", "/run/ublk-ubi/.udev", "/run/ublk-ubi/.root",
        "/run/ublk-ubi/.watch.lock", "/run/ublk-ubi/.watch.log",
        "/sys/kernel/config/nullb/features",
    }


def leaks(before: set[str], exempt: set[str]) -> set[str]:
    """What is there and was not before, once all has settled."""
    exempt = exempt | {f"mount {name}" for name in exempt}
    deadline = time.monotonic() + SETTLE_S
    while True:
        left = inventory() - before - exempt
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def stuck_processes() -> list[str]:
    """Those of the product that are in uninterruptible sleep."""
    found = []
    for process in _processes():
        pid = process.split()[1].rstrip(":")
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "D":
                found.append(process)
    return found


def _entries(folder: str) -> set[str]:
    try:
        return {f"{folder}/{entry}" for entry in os.listdir(folder)}
    except FileNotFoundError:
        return set()


def _disks() -> set[str]:
    """Disks and partitions; a loop device stays when its file has gone."""
    names = [line.split()[3] for line in Path("/proc/partitions").read_text().splitlines()[2:]]
    return {f"/dev/{name}" for name in names if not name.startswith("loop")}


def _processes() -> set[str]:
    """Daemons and helpers of the product."""
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            if any(word.startswith(b"ublk_ubi.") or word == b"ublk_ubi" for word in words):
                found.add(f"process {entry}: {b' '.join(words).decode(errors='replace').strip()}")
    return found
