"""Brings back disks whose daemons died, and moves disks to the version that is installed.

A disk whose daemon died stays: its requests wait. `recover` starts a daemon that takes it over.
`upgrade` starts one that is ready to, has the old one leave, and lets it; if it does not come up,
the old one goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import msgspec

from ublk_ubi import rpc, runtime, systemd
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.launch import Ready, start_daemon
from ublk_ubi.options import DeviceOptions, continued
from ublk_ubi.table import VERSION as TABLE_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.runtime import Device

LEAVE_TIMEOUT_S = 30.0
RESUME_TIMEOUT_S = 30.0
_POLL_S = 0.05


def options_of(device: Device) -> DeviceOptions:
    """Return what a device was made of, as its next daemon needs it. Raises UbiError."""
    path = os.path.join(device.folder, "options.json")
    try:
        options = msgspec.json.decode(
            runtime.read_of(device, "options.json"), type=DeviceOptions,
        )
    except FileNotFoundError:
        raise UbiError(
            f"{device.name} was never live: clear it up with `ublk-ubi del {device.name}`",
        ) from None
    except OSError as error:
        raise UbiError(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise UbiError(
            f"{path} is of another version of ublk-ubi ({error}): use that one for {device.name}",
        ) from None
    return continued(options, device.name)


def recover(
    device: Device,
    notice: Callable[[str], None] | None = None,
    *,
    interrupt_fd: int | None = None,
) -> Ready:
    """Start a daemon for a disk whose daemon died. Raises UbiError; busy if it is served.

    `interrupt_fd` is for other threads than the main one: see `start_daemon`.
    """
    if device.alive:
        raise UbiError(f"{device.name} is served by process {device.pid}: nothing to do", Exit.BUSY)
    if device.state is None or device.state.id is None:
        raise UbiError(
            f"{device.name} was never live: clear it up with `ublk-ubi del {device.name}`",
        )
    options = options_of(device)
    runtime.clear_trouble(device)
    if systemd.is_restarted(device):
        systemd.start(device)
        return _as_ready(systemd.refresh(device))
    return start_daemon(options, notice, recover=True, interrupt_fd=interrupt_fd)


def waiting(name: str, base: str) -> DeviceOptions | None:
    """Return what the disk was made of that waits under this name for a daemon; None: none does.

    Raises UbiError when it is a disk on another base.
    """
    for device in runtime.all_devices():
        state = device.state
        if device.name != name or device.alive or state is None or not state.recoverable:
            continue
        if state.base != os.path.realpath(base):
            raise UbiError(
                f"{name}: a disk on {state.base} waits under this name, not one on {base}: end it "
                f"with `ublk-ubi del {name}`",
                Exit.BUSY,
            )
        return options_of(device)
    return None


def upgrade(
    device: Device,
    notice: Callable[[str], None] | None = None,
    *,
    interrupt_fd: int | None = None,
) -> tuple[Ready, float | None]:
    """Move a disk to a daemon of this version; also how long its requests waited, in seconds.

    None when the daemon before did not tell when it left, as one of an older version does.

    Raises UbiError: before anything is touched when this version cannot go on where that one is,
    or when the new daemon did not come up, and what became of the old one.
    """
    if not device.alive:
        raise UbiError(f"{device.name}: its daemon died: bring it back with `ublk-ubi recover "
                       f"{device.name}`")
    _check_versions(device)
    assert device.state is not None
    if systemd.is_restarted(device) and systemd.own_unit() != device.state.unit:
        systemd.reload(device)
        now = systemd.refresh(device)
        return _as_ready(now), now.state.waited_s if now.state is not None else None
    left_at = 0.0

    def leave() -> None:
        nonlocal left_at
        left_at = time.monotonic()
        try:
            rpc.call(device.socket, "leave", {"upgrader": os.getpid()}, LEAVE_TIMEOUT_S)
        except UbiError as error:
            if error.code == Exit.BUSY:
                left_at = 0.0  # it refuses, and serves on
            raise

    try:
        ready = start_daemon(
            options_of(device), notice, recover=True, before_go=leave, interrupt_fd=interrupt_fd,
        )
    except UbiError as error:
        if left_at == 0.0:
            raise
        raise _fall_back(device, error) from None
    return ready, time.monotonic() - left_at


def _as_ready(now: Device) -> Ready:
    """Describe a disk whose daemon systemd has started."""
    assert now.state is not None
    return Ready(
        ok=True, name=now.name, device=now.state.device or "", link=now.state.link or "",
        pid=now.pid or 0, size=now.state.size or 0,
    )


def _check_versions(device: Device) -> None:
    """Refuse what this version could not go on with. Raises UbiError."""
    status = rpc.call(device.socket, "status")
    table = status.get("table_version", TABLE_VERSION)
    if table != TABLE_VERSION:
        raise UbiError(
            f"{device.name}: its daemon keeps a table of version {table}, this version knows "
            f"{TABLE_VERSION}: delete and add the disk to change over",
        )
    if not status.get("recoverable"):
        raise UbiError(
            f"{device.name} was added with --no-recovery: delete and add it to change over",
        )
    options_of(device)


def _fall_back(device: Device, error: UbiError) -> UbiError:
    """Have the old daemon go on, if it lives; return what to tell."""
    with contextlib.suppress(OSError):
        os.kill(device.pid or 0, signal.SIGUSR1)
    deadline = time.monotonic() + RESUME_TIMEOUT_S
    while time.monotonic() < deadline and runtime.process_start(device.pid or 0) is not None:
        now = runtime.refresh(device)
        if now is not None and now.alive and not now.starting:
            return UbiError(
                f"{device.name}: the new daemon did not come up ({error.message}); the old one "
                "goes on",
            )
        time.sleep(_POLL_S)
    return UbiError(
        f"{device.name}: the new daemon did not come up ({error.message}), nor did the old one go "
        f"on: its requests wait; `ublk-ubi recover {device.name}`",
        Exit.DEGRADED,
    )
