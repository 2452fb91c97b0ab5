"""Gives SPDK its bdevs and controllers again after it restarted: it keeps nothing by itself.

A connection to SPDK's socket that does nothing tells when SPDK ends; another one that can be made,
that it is back. What cannot be given to it yet, as a disk whose daemon is dead, it gets when that
can be had. On a thread of its own; SPDK that is not there holds up nobody.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from ublk_ubi.rpc import short_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.serve.disks import Disks

RETRY_S = 0.5
AGAIN_S = 2.0


class Keeper:
    """Watches one SPDK. `found` is set while it is there."""

    def __init__(self, path: str, disks: Disks, report: Callable[[str], None]) -> None:
        self._path = path
        self._disks = disks
        self._report = report
        self.found = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        waits = False
        while True:
            sock = self._connect()
            if sock is None:
                if not waits:
                    self._report(f"SPDK at {self._path} is not there: waiting for it")
                waits = True
                pause.wait(RETRY_S)
                continue
            with sock:
                self._report(f"SPDK at {self._path} is there")
                told: set[str] = set()
                missing = self._disks.attach_again(told)
                self.found.set()
                sock.settimeout(AGAIN_S)
                with contextlib.suppress(OSError):
                    while self._is_there(sock):
                        if missing:
                            missing = self._disks.attach_again(told, missing)
                self.found.clear()
            self._report(f"SPDK at {self._path} has ended")
            waits = False

    def _is_there(self, sock: socket.socket) -> bool:
        """Wait a while for SPDK's end; whether it has not come. Raises OSError when it has."""
        try:
            return bool(sock.recv(1))
        except TimeoutError:
            return True

    def _connect(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with short_path(self._path) as short:
                sock.connect(short)
        except OSError:
            sock.close()
            return None
        return sock
