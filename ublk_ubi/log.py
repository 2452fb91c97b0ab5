"""What a daemon, or the watch, has to tell: lines on standard error.

    a file of ours      each line with its time; at most 1 MiB, the older half is dropped in place
    the journal         with a priority and no time (sd-daemon(3)); it counts and drops by itself
    anything else       with its time: a terminal, a pipe

The same line again is counted and not written; the count is told with the next other line, and once
a minute.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_BYTES = 1 << 20
REPEATS_TOLD_S = 60.0
NOTICE, WARNING = 6, 4  # as syslog(3) has them
_STANDARD_ERROR = 2


class Log:
    """Writes to the descriptor `fd`; `own`: it is a file that only this process writes."""

    def __init__(
        self, fd: int, *, own: bool = False, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fd = fd
        self._own = own
        self._clock = clock
        self._journal = is_journal(fd, os.environ.get("JOURNAL_STREAM"))
        self._lock = threading.Lock()
        self._last = ""
        self._repeats = 0
        self._told_at = 0.0

    def keep_bounded(self) -> None:
        """Drop old lines from now on: it is a file that only this process writes."""
        self._own = True

    def write(self, message: str, priority: int = NOTICE) -> None:
        """One line. Where there is no room for it, the disk matters more."""
        with self._lock:
            now = self._clock()
            if message == self._last:
                self._repeats += 1
                if now - self._told_at >= REPEATS_TOLD_S:
                    self._tell_repeats(now, priority)
                return
            if self._repeats:
                self._tell_repeats(now, priority)
            self._last, self._told_at = message, now
            self._put(message, priority)

    def _tell_repeats(self, now: float, priority: int) -> None:
        times = "once more" if self._repeats == 1 else f"{self._repeats} times more"
        self._put(f"repeated {times}: {self._last}", priority)
        self._repeats, self._told_at = 0, now

    def _put(self, message: str, priority: int) -> None:
        head = f"<{priority}>" if self._journal else time.strftime("%Y-%m-%d %H:%M:%S ")
        data = "".join(f"{head}{line}\n" for line in message.splitlines()).encode(errors="replace")
        with contextlib.suppress(OSError):
            if self._own:
                self._make_room(len(data))
            os.write(self._fd, data)

    def _make_room(self, length: int) -> None:
        """Drop the older half of a file that would get too long."""
        size = os.fstat(self._fd).st_size
        if size + length <= LIMIT_BYTES:
            return
        kept = os.pread(self._fd, LIMIT_BYTES // 2, size - LIMIT_BYTES // 2)
        kept = kept[kept.find(b"\n") + 1 :]
        os.ftruncate(self._fd, 0)
        os.write(self._fd, b"(older lines were dropped)\n" + kept[: LIMIT_BYTES // 2])


def is_journal(fd: int, stream: str | None) -> bool:
    """Tell whether `fd` is what JOURNAL_STREAM names (systemd.exec(5))."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


_standard: Log | None = None


def standard() -> Log:
    """Return the log of this process, on its standard error."""
    global _standard  # noqa: PLW0603 - there is one standard error
    if _standard is None:
        _standard = Log(_STANDARD_ERROR)
    return _standard


def log(message: str) -> None:
    """One line in this process's log."""
    standard().write(message)


def warn(message: str) -> None:
    """One line about something that is wrong, and whose way out may be somebody's to take."""
    standard().write(message, WARNING)
