"""The disk's I/O scheduler: none.

The kernel gives a disk with one hardware queue mq-deadline (block/elevator.c,
elevator_set_default). What is beneath image and base has a scheduler, or has none for a reason; a
second one on top of it costs a seventh of all instructions of a random read of 4 KiB, and puts in
order what is put in order again. Who wants one all the same sets it, by hand or by a rule of
udev's: it is dropped once, when the disk is made.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

_BLOCKS = "/sys/block"


class Elevator:
    """The schedulers of disks that are yet to be, also once /sys is out of reach (sandbox.py)."""

    def __init__(self, blocks: str = _BLOCKS) -> None:
        self._blocks = -1
        with contextlib.suppress(OSError):
            self._blocks = os.open(blocks, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def drop(self, disk: str) -> None:
        """Take the scheduler of `disk` ("ublkb0") away. If it stays, that is no failure."""
        if self._blocks < 0:
            return
        with contextlib.suppress(OSError):
            fd = os.open(f"{disk}/queue/scheduler", os.O_WRONLY | os.O_CLOEXEC,
                         dir_fd=self._blocks)
            try:
                os.write(fd, b"none")
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        """Return it; `with` ends with no mount of the host's held."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of /sys."""
        if self._blocks >= 0:
            os.close(self._blocks)
            self._blocks = -1
