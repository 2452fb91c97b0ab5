"""A daemon that is short of memory must not wait for its own disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Ubi
    from support.images import Image

KIB, MIB = 1 << 10, 1 << 20
# PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of <linux/sched.h>: what PR_SET_IO_FLUSHER sets
IO_FLUSHER = 0x00080000 | 0x00100000


def thread_flags(pid: int) -> dict[str, int]:
    """Name and kernel flags of each thread (proc_pid_stat(5), the ninth field)."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, _, fields = (task / "stat").read_text().partition("(")[2].rpartition(")")
        found[name] = int(fields.split()[6])
    return found


def test_threads_that_io_waits_for_are_io_flushers(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(4 * MIB), make_base(4 * MIB), queues=2)
    flags = thread_flags(device.pid)
    threads = {name for name in flags if name.startswith("ubi-")}
    assert threads == {"ubi-queue-0", "ubi-queue-1", "ubi-hydrator"}
    assert [name for name in threads if flags[name] & IO_FLUSHER != IO_FLUSHER] == []
    device.stop()


def test_the_table_is_locked_in_memory(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(4 * MIB), make_base(4 * MIB), stripe_size=64 * KIB)
    status = Path(f"/proc/{device.pid}/status").read_text()
    locked = int(re.search(r"^VmLck:\s+(\d+) kB$", status, re.MULTILINE)[1]) * KIB
    (table,) = (entry for entry in os.scandir("/run/ublk-ubi/.tables"))
    assert locked >= table.stat().st_size > 4096
    device.stop()
