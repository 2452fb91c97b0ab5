"""Brings back disks whose daemons die, where systemd does not: one small process a host.

`add` starts it when none runs; it ends a few seconds after the last disk that it could bring back.
A daemon that dies `MOST_DEATHS` times within `WINDOW_S` seconds is not started again: its disk's
requests wait, `status` says why, and `recover` or `del --force` by an operator ends that.

A daemon that left on purpose (SIGTERM, an upgrade) is not its business, nor one of systemd's units,
which systemd starts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from ublk_ubi import runtime
from ublk_ubi.errors import UbiError
from ublk_ubi.launch import environment, let_go
from ublk_ubi.log import log, standard
from ublk_ubi.systemd import scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.runtime import Device

MOST_DEATHS = 5
WINDOW_S = 60.0
PERIOD_S = 1.0
LINGER_S = 5.0


def lock() -> int | None:
    """Become the one watch of this host; its lock, or None when there is one already."""
    fd = runtime.open_in_root(".watch.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def start_in_background(name: str) -> None:
    """Start a watch for the live device `name` unless one runs, which sees it as well.

    What cannot be brought back (--no-recovery, an old kernel) needs none.
    """
    if not any(
        device.name == name and device.state is not None and device.state.recoverable
        and device.state.unit is None
        for device in runtime.all_devices()
    ):
        return
    fd = lock()
    if fd is None:
        return
    os.close(fd)
    log_fd = runtime.open_in_root(
        ".watch.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
    )
    try:
        let_go(subprocess.Popen(
            [*scope("watch"), sys.executable, "-P", "-m", "ublk_ubi.watch"],
            stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd, cwd="/", env=environment(),
            start_new_session=True,
        ))
    finally:
        os.close(log_fd)


class Watch:
    """Watches all devices; `report` gets a line for what happens."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._deaths: dict[str, deque[float]] = {}
        self._processes: dict[str, tuple[int, int]] = {}  # name: pid, pidfd
        self._at_work: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *, linger_s: float | None = LINGER_S) -> None:
        """Watch until there is nothing to watch for `linger_s` seconds; None: for ever."""
        idle_since: float | None = None
        while True:
            if self.look():
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif linger_s is not None and time.monotonic() - idle_since > linger_s:
                return
            self._wait()

    def look(self) -> bool:
        """See who lives and who has died; True while there is something to watch."""
        devices = [
            device for device in runtime.all_devices()
            if device.state is not None and device.state.recoverable
            and device.state.unit is None  # systemd's own business
        ]
        names = {device.name for device in devices}
        for name in [name for name in self._processes if name not in names]:
            self._forget(name)
        for device in devices:
            if device.alive:
                self._follow(device)
            elif device.state is not None and not device.state.left:
                self._bring_back(device)
        return bool(devices)

    def _wait(self) -> None:
        """Sleep until a daemon ends, or for a moment."""
        poll = select.poll()
        for _, fd in self._processes.values():
            poll.register(fd, select.POLLIN)
        poll.poll(PERIOD_S * 1000)
        for name, (_, fd) in list(self._processes.items()):
            if select.select([fd], [], [], 0)[0]:
                self._forget(name)

    def _follow(self, device: Device) -> None:
        """Be told when this very process ends."""
        known = self._processes.get(device.name)
        if device.pid is None or (known is not None and known[0] == device.pid):
            return
        self._forget(device.name)
        with contextlib.suppress(ProcessLookupError):
            self._processes[device.name] = (device.pid, os.pidfd_open(device.pid))

    def _forget(self, name: str) -> None:
        known = self._processes.pop(name, None)
        if known is not None:
            os.close(known[1])

    def _bring_back(self, device: Device) -> None:
        """Recover a disk whose daemon died, in a process of its own: it may have to wait."""
        worker = self._at_work.get(device.name)
        if device.trouble is not None or (worker is not None and worker.poll() is None):
            return
        deaths = self._deaths.setdefault(device.name, deque(maxlen=MOST_DEATHS))
        now = time.monotonic()
        deaths.append(now)
        if len(deaths) == MOST_DEATHS and now - deaths[0] < WINDOW_S:
            deaths.clear()
            self._give_up(device)
            return
        self._report(f"{device.name}: its daemon (process {device.pid}) died; bringing it back")
        self._at_work[device.name] = subprocess.Popen(
            [sys.executable, "-P", "-m", "ublk_ubi", "recover", device.name],
            stdin=subprocess.DEVNULL, cwd="/", env=environment(), start_new_session=True,
        )

    def _give_up(self, device: Device) -> None:
        reason = (
            f"its daemon died {MOST_DEATHS} times within {WINDOW_S:g} s, the last time saying: "
            f"{last_line(device)}; its requests wait until `ublk-ubi recover {device.name}` or "
            f"`ublk-ubi del --force {device.name}`"
        )
        runtime.write_trouble(device, reason)
        self._report(f"{device.name}: {reason}")


def last_line(device: Device) -> str:
    """Quote the last line of a device's log."""
    try:
        lines = runtime.read_of(device, "log")[-4096:].decode(errors="replace").split("\n")
    except (OSError, UbiError):
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")[:400]


def main() -> int:
    """Run in the background until there is nothing to watch."""
    from ublk_ubi import hygiene  # not for `add`, which starts this

    standard().keep_bounded()
    hygiene.close_inherited()
    hygiene.settle(log)
    while True:
        fd = lock()
        if fd is None:
            return 0
        Watch(log).run()
        os.close(fd)
        # Who added a disk while the lock was held relies on this look.
        if not Watch(log).look():
            return 0


if __name__ == "__main__":
    sys.exit(main())
