"""Gives SPDK its bdevs and controllers again after it restarted: it keeps nothing by itself.

A connection to SPDK's socket that does nothing tells when SPDK ends; another one that can be made,
that it is back. On a thread of its own; SPDK that is not there holds up nobody.
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
        told = False
        while True:
            sock = self._connect()
            if sock is None:
                if not told:
                    self._report(f"SPDK at {self._path} is not there: waiting for it")
                told = True
                pause.wait(RETRY_S)
                continue
            with sock:
                self._report(f"SPDK at {self._path} is there")
                self._disks.attach_again()
                self.found.set()
                with contextlib.suppress(OSError):
                    while sock.recv(1):
                        pass
                self.found.clear()
            self._report(f"SPDK at {self._path} has ended")
            told = False

    def _connect(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with short_path(self._path) as short:
                sock.connect(short)
        except OSError:
            sock.close()
            return None
        return sock
