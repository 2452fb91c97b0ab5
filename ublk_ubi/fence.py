"""The fence: nobody writes a base before every write of a previous daemon has landed.

A killed daemon's writes may be in flight for as long as its disk takes. Its flock(LOCK_EX), and a
block device's exclusive claim, belong to the open file description that its rings write through,
and end with the last reference to it: the writes'. So whoever has them may write, and nothing else
(the daemon's death, the state of its device) proves that.

One `Fence` serves one opening of one base: its time limit holds for claim and lock together.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

from .errors import Exit, UbiError
from .files import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from .files import Identity
    from .topology import Topology

# udev and partitioning tools lock a device for a moment: no reason to speak, nor to refuse
GRACE_S = 1.0
_NOTICE_AFTER_S = 0.25
_POLL_S = 0.02
_MAX_POLL_S = 0.2


class Fence:
    """Waits for a base; `holder` names the live device that has it, `notice` hears of a wait."""

    def __init__(
        self,
        path: str,
        *,
        timeout_s: float,
        holder: Callable[[Identity], str | None],
        notice: Callable[[str], None],
        topology: Topology,
    ) -> None:
        self.topology = topology
        self._path = path
        self._timeout_s = timeout_s
        self._holder = holder
        self._notice = notice
        self._noticed = False
        self._started_s: float | None = None
        self._poll_s = _POLL_S

    @property
    def waited_s(self) -> float:
        """Seconds since the base was first found held."""
        return 0.0 if self._started_s is None else time.monotonic() - self._started_s

    @property
    def is_over(self) -> bool:
        """Whether the time limit has passed: the next `pause` refuses."""
        return self.waited_s >= self._timeout_s

    def lock(self, fd: int, identity: Identity) -> None:
        """Take flock(LOCK_EX) on `fd`'s open file description.

        Raises UbiError: a live device has the base, or others read it as their image (BUSY); it
        is held when the limit has passed (TIMED_OUT); its filesystem has no locks.
        """
        try:
            while not _try_lock(fd, fcntl.LOCK_EX):
                # A base's lock is never shared. The exclusive lock may have gone this moment, so
                # it is asked for again with the shared one in hand.
                if self.waited_s >= GRACE_S and _try_lock(fd, fcntl.LOCK_SH):
                    if _try_lock(fd, fcntl.LOCK_EX):
                        break
                    raise UbiError(
                        f"base {shown(self._path)} is being read by {self._owners(fd)} (as the "
                        "image of a device?): end that first, or name another base",
                        Exit.BUSY,
                    )
                self.pause(fd, identity)
        except OSError as error:
            raise UbiError(
                f"base {shown(self._path)} cannot be locked ({error.strerror}): put it on a "
                "filesystem that has flock(2)",
            ) from None

    def pause(self, fd: int, identity: Identity) -> None:
        """Wait a moment for whoever holds the base; refuse when that is no use, or no more.

        `fd` is any descriptor of the base, `identity` what it is. Raises UbiError as `lock` does.
        """
        path = shown(self._path)
        if self._started_s is None:
            self._started_s = time.monotonic()
        if name := self._holder(identity):
            raise UbiError(
                f"base {path} is in use by device {name}: `ublk-ubi del {name}` first, or name "
                "another base",
                Exit.BUSY,
            )
        if self.is_over:
            raise UbiError(
                f"base {path} is still held by {self._owners(fd)} after {self._timeout_s:g} s: "
                "its writes may be on their way yet; look at its disk, and try again",
                Exit.TIMED_OUT,
            )
        if self.waited_s >= _NOTICE_AFTER_S and not self._noticed:
            self._noticed = True
            self._notice(f"waiting for base {path}: writes of a previous daemon may be in flight")
        time.sleep(min(self._poll_s, max(self._timeout_s - self.waited_s, 0.001)))
        self._poll_s = min(self._poll_s * 1.5, _MAX_POLL_S)

    def _owners(self, fd: int) -> str:
        return ", ".join(self.topology.lockers(os.fstat(fd))) or "another program"


def is_locked(fd: int) -> bool:
    """Tell whether another has the exclusive flock on the file; `fd` itself must have none."""
    if not _try_lock(fd, fcntl.LOCK_SH):
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
