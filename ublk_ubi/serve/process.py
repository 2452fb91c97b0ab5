"""The process of `ublk-ubi serve`: one loop for sockets and signals, threads for all that waits.

There is one a host. It may be killed and started again at any moment: disks are daemons, and go on.
Asked to end it takes no more requests, has starts that are under way come to nothing, lets the rest
finish for a while, and leaves every disk as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from ublk_ubi import launch, runtime, structs
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.notify import Manager
from ublk_ubi.rpc import short_path
from ublk_ubi.rpc_server import Limits, Server
from ublk_ubi.serve import loading
from ublk_ubi.serve.book import Book
from ublk_ubi.serve.disks import Disks
from ublk_ubi.serve.jobs import Jobs
from ublk_ubi.serve.keeper import Keeper
from ublk_ubi.serve.methods import Methods
from ublk_ubi.signals import ENDING

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = Limits(request=256 << 10, clients=256, owed=128, waiting=192, batch=256, idle=True)
END_S = 15.0
LINGER_S = 2.0
SPDK_WAIT_S = 60.0
SWEEP_S = 1.0  # between looks for clients that left without their answer


def log(message: str) -> None:
    """One line on standard error."""
    with contextlib.suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=sys.stderr, flush=True)


def default_socket() -> str:
    """Give the path of the socket where clients look for it."""
    return os.path.join(runtime.run_root(), "rpc.sock")


class Serve:
    """The one server of a host. Raises UbiError where it cannot be."""

    def __init__(self, path: str, spdk_socket: str | None) -> None:
        self._path = path
        self._lock_fd = _lock()
        refuse_taken(path)
        structs.make_ready()
        self._selector = selectors.DefaultSelector()
        self._signals_fd = _catch_signals()
        self._selector.register(self._signals_fd, selectors.EVENT_READ, self._on_signal)
        self._jobs = Jobs(self._selector, log)
        book = Book(os.path.join(runtime.run_root(), ".serve.json"))
        self._disks = Disks(
            book, log, spdk_socket=spdk_socket, interrupt_fd=self._jobs.interrupt_fd,
        )
        self._keeper = None
        if spdk_socket is not None:
            self._keeper = Keeper(spdk_socket, self._disks, log)
        self._methods = Methods(self._disks, self._jobs, self._stop)
        self._server = Server(
            path, self._methods.table, self._selector, other=self._methods.other, report=log,
            limits=LIMITS,
        )
        self._jobs.who = lambda: self._server.serving
        self._sweep_at = 0.0
        self._end_at: float | None = None
        self._problem: UbiError | None = None
        self._manager = Manager.of_this_process()
        self._patience = contextlib.ExitStack()
        """Has the service manager wait until the configuration is there."""

    def run(self, calls: list[loading.Call]) -> int:
        """Serve to the end; the exit code. Raises UbiError when the configuration failed."""
        log(f"listening on {self._path}")
        self._patience.enter_context(self._manager.patience())
        if self._keeper is not None:
            self._keeper.start()
        loader = loading.Loader(calls, self._methods, self._jobs, self._on_loaded)
        self._jobs.put("wait", self._wait_for_spdk, lambda *_: loader.start())
        try:
            self._loop(lambda: bool(self._jobs.making) or loader.busy)
        finally:
            self._server.close(linger_s=LINGER_S)
        log("ended; the disks go on")
        if self._problem is not None:
            raise self._problem
        return Exit.OK

    def _loop(self, is_busy: Callable[[], bool]) -> None:
        while self._end_at is None or (is_busy() and time.monotonic() < self._end_at):
            waits = [self._server.tick(), self._methods.tick(), self._sweep()]
            if self._end_at is not None:
                waits.append(0.1)
            due = [wait for wait in waits if wait is not None]
            for key, mask in self._selector.select(min(due) if due else None):
                key.data(mask)
        for key, mask in self._selector.select(0):
            key.data(mask)  # the last answers

    def _wait_for_spdk(self) -> None:
        """At a boot SPDK may come later than its configuration."""
        if self._keeper is not None:
            self._keeper.found.wait(SPDK_WAIT_S)

    def _on_loaded(self, error: UbiError | None) -> None:
        """Go on, or end if the configuration cannot be had; on the loader's thread."""
        def act() -> None:
            if self._end_at is not None:
                return  # it was asked to end meanwhile
            if error is not None:
                self._problem = error
                self._stop()
            else:
                self._methods.initialized()
                log("ready")
                self._patience.close()
                self._manager.ready(f"listening on {self._path}")

        self._jobs.later(act)

    def _sweep(self) -> float:
        """Notice clients that left, so that nobody waits in their stead."""
        now = time.monotonic()
        if now >= self._sweep_at:
            self._server.drop_who_left()
            self._sweep_at = now + SWEEP_S
        return self._sweep_at - now

    def _on_signal(self, _mask: int) -> None:
        """End, or bury daemons that have ended: they are children of this process."""
        numbers = os.read(self._signals_fd, 4096)
        if any(number in ENDING for number in numbers):
            self._stop()
        launch.reap()

    def _stop(self) -> None:
        if self._end_at is None:
            log("ending")
            self._patience.close()
            self._manager.stopping("ending; the disks go on")
            self._end_at = time.monotonic() + END_S
            self._jobs.interrupt()
            self._methods.end()


def _lock() -> int:
    """Become the one server of this host. Raises UbiError (busy)."""
    runtime.tables_dir()  # makes the folder where the lock lies
    path = os.path.join(runtime.run_root(), ".serve.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UbiError("another `ublk-ubi serve` runs already: end it first", Exit.BUSY) from None
    return fd


def refuse_taken(path: str) -> None:
    """Refuse a socket on which another program listens. Raises UbiError (busy)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            with short_path(path) as short:
                sock.connect(short)
        except BlockingIOError:
            pass  # it listens, and is busy
        except OSError:
            return
    raise UbiError(f"{path}: another program listens there: give another -r", Exit.BUSY)


def _catch_signals() -> int:
    """Signals become bytes in a pipe that the loop reads."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (*ENDING, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    return read_fd
