"""The device's node, and its owner: udev has a say in it, too.

udev's own rules give every disk to root:disk, when it gets to it: after us, maybe. So who wants the
node to be somebody's listens for udev's word that it is done with the device, and looks again.
Events of later (`udevadm trigger`) are for a rule of ublk-ubi's to answer, not for a daemon.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import time
from typing import TYPE_CHECKING, Self

from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from types import TracebackType

UDEV_CONTROL = "/run/udev/control"
WAIT_S = 3.0
DEFAULT_MODE = 0o660
_KOBJECT_UEVENT = 15               # a family of netlink(7)
_UDEV_GROUP = 2                    # what udev is done with; group 1 is the kernel's own word
_BUFFER_BYTES = 1 << 20
# Of systemd's sd-device/device-monitor.c: prefix, magic, where the properties are.
_HEADER = struct.Struct("=8s4sIII")
_PREFIX = b"libudev\0"
_MAGIC = b"\xfe\xed\xca\xfe"


class Udev:
    """What udev says from the moment that this is made. Where there is no udev, nothing."""

    def __init__(self, control: str = UDEV_CONTROL) -> None:
        self._socket: socket.socket | None = None
        if not os.path.exists(control):
            return
        try:
            listener = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK,
                                     _KOBJECT_UEVENT)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            listener.bind((0, _UDEV_GROUP))
        except OSError:
            return
        self._socket = listener

    def wait_for(self, path: str, timeout_s: float = WAIT_S) -> None:
        """Wait until it is done with the node at `path`; not for ever, as it may be elsewhere."""
        deadline = time.monotonic() + timeout_s
        while self._socket is not None and (left := deadline - time.monotonic()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                return
            try:
                message = self._socket.recv(_BUFFER_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return  # it has said more than there was room for: its word may have been among it
            if is_about(message, path):
                return

    def __enter__(self) -> Self:
        """Return it; `with` ends the listening."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Listen no more."""
        if self._socket is not None:
            self._socket.close()


def is_about(message: bytes, path: str) -> bool:
    """Whether udev says that it is done with the node at `path`."""
    if len(message) < _HEADER.size:
        return False
    prefix, magic, _, start, length = _HEADER.unpack_from(message)
    if (prefix, magic) != (_PREFIX, _MAGIC):
        return False
    return f"DEVNAME={path}".encode() in message[start : start + length].split(b"\0")


def give(path: str, ids: tuple[int, int], mode: int, udev: Udev) -> None:
    """Make the node somebody's (uid, gid; -1: as it is), also when udev has been there.

    Raises UbiError.
    """
    try:
        _set(path, ids, mode)
        if ids == (-1, -1) and mode == DEFAULT_MODE:
            return  # as udev has it, but for a group of its choice
        wanted = _look(path)
        udev.wait_for(path)
        if _look(path) != wanted:
            _set(path, ids, mode)
    except OSError as error:
        raise UbiError(f"{path}: its owner or mode cannot be set: {error.strerror}") from None


def _look(path: str) -> tuple[int, int, int]:
    node = os.stat(path)
    return node.st_uid, node.st_gid, stat.S_IMODE(node.st_mode)


def _set(path: str, ids: tuple[int, int], mode: int) -> None:
    if ids != (-1, -1):
        os.chown(path, *ids)
    os.chmod(path, mode)
