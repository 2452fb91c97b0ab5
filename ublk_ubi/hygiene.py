"""What a process that serves disks, or watches over them, sets right about itself before it begins.

None of it is needed for a disk to work, and any of it may be refused (a container, a kernel without
it): then it says so once, and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
from typing import TYPE_CHECKING

from ublk_ubi import kernel_calls as calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OOM_SCORE_ADJ = -1000
"""Never to be killed for memory: a daemon's is bounded, and a disk that ends frees none."""

MIN_FILES = 1024

refused: list[str] = []
"""What was not permitted to this process, to be told once it has something to serve."""


def settle(notice: Callable[[str], None] = refused.append, *, files: int = MIN_FILES) -> None:
    """Do all of it; `notice` hears what is refused, and what that costs. `files`: how many."""
    os.umask(0o077)
    _try(notice, _never_kill, "the kernel may kill this process when memory is short")
    _try(notice, _flush_io, "a lack of memory may have it wait for its own disk")
    _try(notice, _lock_limit, "its memory may not be locked")
    _try(notice, lambda: _files_limit(files), "it may run out of descriptors")


def close_inherited(meant: Iterable[int] = ()) -> None:
    """Close what came along from whoever started this process, but 0 to 2 and what is `meant`.

    Own descriptors have close-on-exec, and inherited ones cannot have it.
    """
    kept = {0, 1, 2, *meant}
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        with contextlib.suppress(OSError):
            if fd not in kept and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(fd)


def lock_memory() -> None:
    """Keep in memory what is there, and what will be once it is touched. Raises OSError.

    Programs and libraries are read in as a whole: they could be needed first when nothing can be
    read. They are the same pages for all daemons. What is mapped and was never touched, as buffers
    that no request has needed, takes no memory.
    """
    calls.mlockall(calls.MCL_CURRENT | calls.MCL_FUTURE | calls.MCL_ONFAULT)
    for start, length in _text(_maps()):
        with contextlib.suppress(OSError):
            calls.mlock(start, length)


def _maps() -> str:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return file.read()


def _text(maps: str) -> list[tuple[int, int]]:
    """Return address and length of what programs and libraries have that nobody can write."""
    rows = [line.split(maxsplit=5) for line in maps.splitlines()]
    files = {row[5] for row in rows if len(row) == 6 and row[1][2] == "x" and row[4] != "0"}
    found = []
    for row in rows:
        if len(row) == 6 and row[5] in files and row[1][:2] == "r-":
            start, _, end = row[0].partition("-")
            found.append((int(start, 16), int(end, 16) - int(start, 16)))
    return found


def _try(notice: Callable[[str], None], action: Callable[[], None], cost: str) -> None:
    try:
        action()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        notice(f"not permitted here: {cost} ({reason})")


def _never_kill() -> None:
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(OOM_SCORE_ADJ))


def _flush_io() -> None:
    """As every thread that an I/O can wait for: memory that it needs is not got by more I/O."""
    try:
        calls.prctl(calls.PR_SET_IO_FLUSHER, 1)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.6
            raise


def _lock_limit() -> None:
    """Without a limit, so that locking needs no capability later."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) != unlimited:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)


def _files_limit(files: int) -> None:
    """Exactly so many: what leaks is noticed, what is needed is there."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
