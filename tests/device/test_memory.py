"""A daemon that is short of memory must not wait for its own disk."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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
        with contextlib.suppress(OSError):      # it may end meanwhile
            name, _, fields = (task / "stat").read_text().partition("(")[2].rpartition(")")
            found[name] = int(fields.split()[6])
    return found


def mappings(pid: int, part: str) -> list[dict[str, str]]:
    """What smaps (proc_pid_smaps(5)) says of each mapping whose file has `part` in its path."""
    found: list[dict[str, str]] = []
    mine = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mine = part in line
            if mine:
                found.append({})
        elif mine:
            key, _, value = line.partition(":")
            found[-1][key] = value.strip()
    return found


@pytest.mark.cpus(2)
def test_threads_that_io_waits_for_are_io_flushers(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(4 * MIB), make_base(4 * MIB), queues=2)
    flags = thread_flags(device.pid)
    threads = {name for name in flags if name.startswith("ubi-")}
    assert threads == {"ubi-queue-0", "ubi-queue-1", "ubi-hydrator"}
    assert len(flags) > len(threads), "the main thread is asked as well"
    assert [name for name in flags if flags[name] & IO_FLUSHER != IO_FLUSHER] == []
    device.stop()


def test_the_table_is_locked_in_memory(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(4 * MIB), make_base(4 * MIB), stripe_size=64 * KIB)
    [table] = mappings(device.pid, "/.tables/")
    assert "lo" in table["VmFlags"].split()
    assert table["Locked"] == table["Size"]
    device.stop()


def test_programs_are_locked_in_memory(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """What serves requests is not read in again from a disk that waits for it."""
    device = ubi.add(make_image(4 * MIB), make_base(4 * MIB))
    ours = [f"ublk_ubi/{name}" for name in ("_threads", "_queue", "_hydrator", "_ring")]
    for module in (*ours, "liburing", "libc"):
        code = [one for one in mappings(device.pid, module) if "ex" in one["VmFlags"].split()]
        assert code, module
        assert [one for one in code if one["Rss"] != one["Size"]] == [], module
    device.stop()
