"""What the service manager is told, over $NOTIFY_SOCKET (sd_notify); nothing without one.

The socket is connected once: a daemon that has left the host's root folder behind still has it. A
manager that does not listen, or is slow, never holds a disk up.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

VARIABLE = "NOTIFY_SOCKET"
STATUS_PERIOD_S = 5.0
EXTENSION_S = 30.0
"""How long a start may go on without another word. Every wait in it has a limit of its own."""

_BEAT_S = 10.0
_MAX_STATUS = 1000  # bytes


class Manager:
    """The service manager of this process, if it has one."""

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        self._status = ""
        self._look_at = 0.0
        self._is_ending = False
        if address is None or address[:1] not in ("/", "@"):
            return
        import socket  # commands import this module for its VARIABLE

        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
        )
        try:
            self._socket.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            self.close()

    @classmethod
    def of_this_process(cls) -> Manager:
        """Find it, and keep it from processes that are started from here."""
        return cls(os.environ.pop(VARIABLE, None))

    @property
    def listens(self) -> bool:
        """Whether there is one."""
        return self._socket is not None

    def close(self) -> None:
        """Say no more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def tell(self, *words: str) -> None:
        """Send assignments, such as READY=1, in one message."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send("\n".join(words).encode(errors="replace"))

    def barrier(self, timeout_s: float) -> None:
        """Wait until all that was told has been heard (sd_notify_barrier)."""
        if self._socket is None:
            return
        import socket

        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                socket.send_fds(self._socket, [b"BARRIER=1"], [write_fd])
        finally:
            os.close(write_fd)
        select.select([read_fd], [], [], timeout_s)  # it closes its copy
        os.close(read_fd)

    def ready(self, line: str) -> None:
        """Say that the disk is live."""
        self._status = line
        self.tell("READY=1", _status(line))

    def stopping(self, line: str) -> None:
        """Say that the end has begun, and why: no `look` says anything after that."""
        self._status = line
        self._is_ending = True
        self.tell("STOPPING=1", _status(line))

    def status(self, line: str) -> None:
        """Say how it is, if that is news."""
        if line != self._status:
            self._status = line
            self.tell(_status(line))

    def look(self, line: Callable[[], str]) -> None:
        """Say how it is, if that is news and the last look some seconds ago."""
        if self._socket is None or self._is_ending:
            return
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + STATUS_PERIOD_S
            self.status(line())

    def wait_s(self, limit_s: float | None) -> float | None:
        """Give the seconds that may pass until `look`, at most `limit_s` (None: for ever)."""
        if self._socket is None or self._is_ending:
            return limit_s
        left = max(0.0, self._look_at - time.monotonic())
        return left if limit_s is None else min(left, limit_s)

    def hears(self, log: Callable[[str], None]) -> Callable[[str], None]:
        """Return a `log` whose lines are its status as well."""
        def both(message: str) -> None:
            log(message)
            self.status(message)

        return both

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """Have it wait as long as what is done here takes: a fence, an image's fsync, zeroing."""
        if self._socket is None:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while True:
                self.tell(f"EXTEND_TIMEOUT_USEC={EXTENSION_S * 1e6:.0f}")
                if over.wait(_BEAT_S):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _status(line: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in line)
    return "STATUS=" + text.encode(errors="replace")[:_MAX_STATUS].decode(errors="ignore")
