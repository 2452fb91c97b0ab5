"""A block device that the test itself serves, over NBD, one request at a time under its eyes.

The test holds requests back, fails them, counts them, and looks at the bytes that have landed
without any I/O. A request that is held is in flight for the kernel: what a killed process has
written lands when the test says so, before or after what comes later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.undo import Undo

SECTOR = 512
METADATA = 8 << 20                 # of a base
READ, WRITE, FLUSH, TRIM, ZERO = "read", "write", "flush", "trim", "zero"

# <linux/nbd.h> and the NBD protocol's transmission phase
_SET_SOCK, _SET_BLKSIZE, _DO_IT, _CLEAR_SOCK = 0xAB00, 0xAB01, 0xAB03, 0xAB04
_SET_SIZE_BLOCKS, _DISCONNECT, _SET_FLAGS = 0xAB07, 0xAB08, 0xAB0A
_HAS_FLAGS, _SENDS_FLUSH, _SENDS_FUA, _SENDS_TRIM = 1, 4, 8, 32
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_DISCONNECT_KIND = 2
_KINDS = {0: READ, 1: WRITE, 3: FLUSH, 4: TRIM, 6: ZERO}
_FUA = 1
_DEVICES = 16


@dataclass(frozen=True)
class Request:
    """A request of the kernel's. Offset and length are bytes; a flush has none."""

    kind: str
    offset: int
    length: int
    fua: bool
    handle: int
    data: bytes = b""

    @property
    def changes(self) -> bool:
        """Whether it is a step towards something durable: a write or a flush."""
        return self.kind != READ

    def touches(self, start: int, end: int) -> bool:
        return self.kind != FLUSH and self.offset < end and self.offset + self.length > start

    @property
    def is_metadata_write(self) -> bool:
        return self.kind == WRITE and self.offset < METADATA


class ServedDisk:
    """One NBD device. `content` is what has landed; any thread may look at it.

    `seen` has every request since it was emptied last, in the order of their coming.
    """

    def __init__(self, size: int) -> None:
        assert size % SECTOR == 0
        self.size = size
        self.content = bytearray(size)
        self.seen: list[Request] = []
        self._lock = threading.Lock()
        self._held: list[Request] = []
        self._hold: Callable[[Request], bool] | None = None
        self._fail: Callable[[Request], bool] | None = None
        self._durable: bytearray | None = None         # what a power loss leaves
        self._volatile: list[tuple[int, bytes]] = []   # written since the last flush
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.path, self._fd = _attach(theirs.fileno(), size)
        self._threads = [
            threading.Thread(target=self._serve, daemon=True),
            threading.Thread(target=fcntl.ioctl, args=(self._fd, _DO_IT), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        theirs.close()
        until(lambda: _size_of(self.path) == size, f"{self.path} has its size")

    # -- what the test says ----------------------------------------------------------------------

    def hold(self, which: Callable[[Request], bool] | None) -> None:
        """Keep matching requests that come from now on in flight, until `release`; None: no more.

        What is held already stays so.
        """
        with self._lock:
            self._hold = which

    def hold_from_step(self, number: int) -> None:
        """Keep in flight the `number`th write or flush that comes from now on, and all after it."""
        steps = itertools.count(1)
        self.hold(lambda request: request.changes and next(steps) >= number)

    def release(self, *, apply: bool = True) -> None:
        """Hold nothing any more; what is held ends now, in its order, or is lost (EIO)."""
        with self._lock:
            self._hold = None
            held, self._held = self._held, []
            for request in held:
                self._carry_out(request, 0 if apply else errno.EIO)

    def fail(self, which: Callable[[Request], bool]) -> None:
        """Answer matching requests that come from now on with EIO, and do nothing."""
        with self._lock:
            self._fail = which

    def heal(self) -> None:
        """Serve everything again."""
        with self._lock:
            self._fail = None
        self.release()

    def be_volatile(self) -> None:
        """Have a cache: from now on `lose_power` takes what was written without FUA or a flush."""
        with self._lock:
            self._durable = bytearray(self.content)

    def lose_power(self) -> None:
        """Lose what the cache holds; what is held is lost, too."""
        self.release(apply=False)
        with self._lock:
            assert self._durable is not None
            self._volatile.clear()
            self.content[:] = self._durable

    @property
    def held(self) -> list[Request]:
        with self._lock:
            return list(self._held)

    def wait_for_held(self, count: int = 1) -> list[Request]:
        """Wait until at least so many requests are held; return them."""
        return until(
            lambda: held if len(held := self.held) >= count else [],
            f"{count} held requests of {self.path}",
        )

    def forget(self) -> None:
        """Empty `seen`."""
        with self._lock:
            self.seen = []

    def at(self, offset: int, length: int) -> bytes:
        """Bytes that have landed."""
        return bytes(self.content[offset : offset + length])

    @property
    def metadata(self) -> bytes:
        """The first 8 MiB of a base, as they have landed."""
        return self.at(0, METADATA)

    # -- the server ------------------------------------------------------------------------------

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as stream:
            while header := stream.read(_REQUEST.size):
                magic, flags, kind, handle, offset, length = _REQUEST.unpack(header)
                assert magic == _REQUEST_MAGIC
                if kind == _DISCONNECT_KIND:
                    break
                name = _KINDS[kind]
                data = stream.read(length) if name == WRITE else b""
                self._take(Request(name, offset, length, bool(flags & _FUA), handle, data))
            self._socket.shutdown(socket.SHUT_RDWR)

    def _take(self, request: Request) -> None:
        with self._lock:
            self.seen.append(request)
            if self._fail and self._fail(request):
                self._answer(request, errno.EIO)
            elif self._hold and self._hold(request):
                self._held.append(request)
            else:
                self._carry_out(request, 0)

    def _carry_out(self, request: Request, error: int) -> None:
        data = b""
        if error == 0 and request.kind == WRITE:
            self._write(request.offset, request.data, durable=request.fua)
        elif error == 0 and request.kind == ZERO:
            self._write(request.offset, bytes(request.length), durable=request.fua)
        elif error == 0 and request.kind == FLUSH:
            self._flush()
        elif error == 0 and request.kind == READ:
            data = self.at(request.offset, request.length)
        self._answer(request, error, data)

    def _write(self, offset: int, data: bytes, *, durable: bool) -> None:
        self.content[offset : offset + len(data)] = data
        if self._durable is not None:
            # FUA as well: of one place the later write counts when a flush comes.
            self._volatile.append((offset, data))
            if durable:
                self._durable[offset : offset + len(data)] = data

    def _flush(self) -> None:
        if self._durable is not None:
            for offset, data in self._volatile:
                self._durable[offset : offset + len(data)] = data
            self._volatile.clear()

    def _answer(self, request: Request, error: int, data: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(_REPLY.pack(_REPLY_MAGIC, error, request.handle) + data)

    def close(self) -> None:
        """Give the device back to the kernel."""
        self.heal()
        fcntl.ioctl(self._fd, _DISCONNECT)
        self._threads[1].join(10.0)
        self._socket.close()
        self._threads[0].join(10.0)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, _CLEAR_SOCK)
        os.close(self._fd)
        assert not any(thread.is_alive() for thread in self._threads), f"{self.path} is still busy"


def serve(undo: Undo, size: int, *, seed: int | None = None) -> ServedDisk:
    """A disk of `size` bytes, zeros or random, that lives as long as the test."""
    disk = ServedDisk(size)
    undo.callback(disk.close)
    undo.healers.append(disk.heal)
    if seed is not None:
        disk.content[:] = random.Random(seed).randbytes(size)
    return disk


def _attach(sock: int, size: int) -> tuple[str, int]:
    """Take a free device of the kernel's; its path and a descriptor of it."""
    if not os.path.exists("/dev/nbd0"):
        pytest.skip("needs the kernel's nbd")
    for number in range(_DEVICES):
        path = f"/dev/nbd{number}"
        if not os.path.exists(path) or Path(f"/sys/block/nbd{number}/pid").exists():
            continue
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _SET_SOCK, sock)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EBUSY:
                continue
            raise
        fcntl.ioctl(fd, _SET_BLKSIZE, SECTOR)
        fcntl.ioctl(fd, _SET_SIZE_BLOCKS, size // SECTOR)
        fcntl.ioctl(fd, _SET_FLAGS, _HAS_FLAGS | _SENDS_FLUSH | _SENDS_FUA | _SENDS_TRIM)
        return path, fd
    pytest.skip("no free nbd device")


def _size_of(path: str) -> int:
    sectors = Path("/sys/block", os.path.basename(path), "size").read_text()
    return int(sectors) * SECTOR
