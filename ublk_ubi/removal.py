"""Takes a device away: stops its daemon, ends one that is stuck, clears up after a dead one.

A device of the kernel's is deleted only when it is verifiably what our dead daemon left: its
`server_flags` hold the random number that this daemon chose (or, without one, its server is that
daemon's process). An id alone proves nothing: the kernel gives it to the next who asks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ublk_ubi import links, rpc, runtime, systemd
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.fence import is_locked
from ublk_ubi.files import identity_of
from ublk_ubi.topology import Topology, node_of

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device, State

DEFAULT_TIMEOUT_S = 30.0
FORCED_TIMEOUT_S = 10.0
_OPENER_PATIENCE_S = 1.0  # udev and blkid open a disk for a moment
_POLL_S = 0.02
_KILL_WAIT_S = 10.0
_LEAST_WAIT_S = 1.0
_LET_GO_S = 2.0
_SPDK_WAIT_S = 5.0
_SHOWN_OPENERS = 5


class Use(NamedTuple):
    """Who uses a disk, what ends that, and whether it may end by itself in a moment."""

    what: str
    way_out: str
    may_pass: bool


def remove_device(device: Device, *, force: bool, timeout_s: float) -> None:
    """Stop the device and wait until it is gone, kernel's device, link, folder and all.

    Without `force` an open or mounted one is refused (busy) with who holds it. With it the daemon
    is killed when it has not stopped within `timeout_s` seconds; without, that is an error
    (timed out), and the daemon goes on stopping.
    """
    if force:
        _take_from_spdk(device)
    if device.alive:
        if not force:
            refuse_if_used(device)
        _stop(device, force=force, timeout_s=timeout_s)
    left = runtime.refresh(device)
    if left is not None and not left.alive:
        if not force:
            refuse_if_used(left)
        systemd.forget(left)
        clear_dead(left, force=force, timeout_s=timeout_s)


def refuse_if_used(device: Device, but: int | None = None) -> None:
    """Raise UbiError (busy) that names the mount, the holder or the processes using a device.

    `but` is a process that may: what it has opened is going to be taken from it.
    """
    if device.state is None or device.state.id is None:
        return
    path = links.device_path(device.state.id)
    deadline = time.monotonic() + _OPENER_PATIENCE_S
    while True:
        use = user_of(path, but)
        if use is None:
            return
        if not use.may_pass or time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S)
    way_out = use.way_out
    if but is None and _is_attached(device):
        way_out = f"`ublk-ubi spdk detach {device.name}` first"
    raise UbiError(
        f"device {device.name} is in use: {use.what}: {way_out}, or take the disk away with "
        "--force",
        Exit.BUSY,
    )


def _is_attached(device: Device) -> bool:
    from ublk_ubi import spdk

    with contextlib.suppress(UbiError):
        return spdk.attachment_of(device) is not None
    return False


def _take_from_spdk(device: Device) -> None:
    """Take a disk's bdev away from SPDK before the disk goes: it would keep a dead one open."""
    from ublk_ubi import spdk

    if _is_attached(device):
        with contextlib.suppress(UbiError):
            spdk.detach(device, force=True, timeout_s=_SPDK_WAIT_S)


def user_of(path: str, but: int | None = None) -> Use | None:
    """Say who uses the block device at `path`: a mount, swap, a holder, processes, or nobody.

    A process `but` may, and may claim it; where it is not the one that does, nobody is named.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    topology = Topology()
    user = topology.user_of(node_of(status))
    if user is not None:
        return Use(user.what, user.way_out, may_pass=False)
    openers = topology.openers(status.st_rdev, but)
    if but is not None and openers == topology.openers(status.st_rdev):
        return None
    if openers:
        more = len(openers) - _SHOWN_OPENERS
        shown = openers[:_SHOWN_OPENERS] + ([f"{more} more"] if more > 0 else [])
        return Use(f"{path} is open in {', '.join(shown)}", "close it first", may_pass=True)
    if but is None and _is_claimed(path):
        what = f"{path} is claimed exclusively, in another mount namespace perhaps"
        return Use(what, "end that first", may_pass=False)
    return None


def clear_dead(device: Device, *, force: bool, timeout_s: float) -> None:
    """Remove what a dead daemon left.

    Raises UbiError as `delete_kernel_device` does; also busy, if a new daemon has taken the name.
    """
    claim = runtime.claim(device.name)
    try:
        state = find_kernel_device(claim.previous)
        if state is not None and state.id is not None:
            delete_kernel_device(device, state, force=force, timeout_s=timeout_s)
            links.remove_link(device.name, state.id)
    except BaseException:
        claim.abandon()
        raise
    claim.release()


def _stop(device: Device, *, force: bool, timeout_s: float) -> None:
    """Ask the daemon to stop and wait until it has ended."""
    deadline = time.monotonic() + timeout_s
    try:
        rpc.call(device.socket, "stop", {"force": force}, timeout_s)
    except rpc.NoAnswerError as error:
        if not force and not _wait_until_ended(device, min(deadline, time.monotonic() + 1.0)):
            raise UbiError(
                f"device {device.name}: its daemon does not answer ({error.message}); "
                "`--force` kills it",
                error.code,
            ) from None
    except UbiError as error:
        if error.code == Exit.BUSY and not force:
            refuse_if_used(device)  # the daemon knows that it is open, we know by whom
        if not force:
            raise
    if _wait_until_ended(device, deadline):
        return
    if not force:
        raise UbiError(
            f"device {device.name} is still stopping after {timeout_s:g} s: wait for it "
            "(`ublk-ubi status`), or kill its daemon with --force",
            Exit.TIMED_OUT,
        )
    _kill(device)


def _wait_until_ended(device: Device, deadline: float) -> bool:
    """Wait until this very daemon has let go of its name."""
    while True:
        now = runtime.refresh(device)
        if now is None or not now.alive or now.pid != device.pid:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)


def _kill(device: Device) -> None:
    """End a daemon by SIGKILL and wait until the kernel has let go of it."""
    try:
        # The descriptor first, the look at the lock second: its holder was alive all the while,
        # so the number cannot have become another process's.
        pidfd = os.pidfd_open(device.pid or 0)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return
        raise UbiError(f"device {device.name}: cannot find its daemon: {error.strerror}") from None
    try:
        now = runtime.refresh(device)
        if now is None or not now.alive or now.pid != device.pid:
            return
        systemd.forbid_restart(device)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
    if not _wait_until_ended(device, time.monotonic() + _KILL_WAIT_S):
        raise UbiError(
            f"device {device.name}: its daemon (process {device.pid}) was killed, but the kernel "
            f"has not ended it within {_KILL_WAIT_S:g} s: the disk under its base may hang",
            Exit.TIMED_OUT,
        )


def find_kernel_device(state: State | None) -> State | None:
    """Complete what a daemon left that died while the kernel made its device: by its cookie."""
    from ublk_ubi.agent_process import CONTROL_PATH
    from ublk_ubi.control import Control

    if state is None or state.id is not None or state.cookie is None:
        return state
    if not os.path.exists(CONTROL_PATH):
        return state
    with Control.open() as control:
        found = control.find_dev(state.cookie)
    return msgspec.structs.replace(state, id=found) if found is not None else state


def delete_kernel_device(
    device: Device, state: State, *, force: bool, timeout_s: float,
) -> None:
    """Delete the kernel's device if it is still the one that this state speaks of.

    Returns when its last writes have landed; who has the dead disk open or mounted keeps its id,
    and nothing else. Raises UbiError: busy if used, without `force`; timed out when they have not
    landed within `timeout_s` seconds (a second at least).
    """
    from ublk_ubi.agent_process import CONTROL_PATH
    from ublk_ubi.control import Control, ControlError, ControlTimeout

    assert state.id is not None
    if not os.path.exists(CONTROL_PATH):
        return  # no driver, no devices
    with Control.open() as control:
        try:
            info = control.get_dev_info(state.id)
            if state.cookie is not None:
                ours = info.server_flags == state.cookie
            else:
                ours = info.pid == state.pid
            if not ours:
                return
            if info.pid is not None and runtime.process_start(info.pid) is not None:
                raise UbiError(
                    f"ublk device {state.id} is served by process {info.pid}, which is not the "
                    "one that died: end that one first",
                    Exit.BUSY,
                )
            if not force:
                refuse_if_used(device)
            # DEL_DEV waits for the dead daemon's writes, and also for whoever has the disk open
            # or mounted still. Only the lock on the base tells which.
            for limit_s in (min(_LET_GO_S, timeout_s), timeout_s):
                with contextlib.suppress(ControlTimeout):
                    control.del_dev(state.id, timeout_s=max(_LEAST_WAIT_S, limit_s))
                    return
                if not _is_writing(device.name, state):
                    return
        except ControlError as error:
            if error.errno != errno.ENODEV:
                raise
            return
    raise UbiError(
        f"device {device.name}, whose daemon died, is still held after {timeout_s:g} s: its last "
        f"writes to {state.base} may be on their way yet; look at its disk, and try again",
        Exit.TIMED_OUT,
    )


def _is_writing(name: str, state: State) -> bool:
    """Tell whether a dead daemon's writes may be in flight: then they hold its base's lock."""
    try:
        fd = os.open(state.base, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        identity = tuple(identity_of(fd, os.fstat(fd)))
        if identity != state.base_identity:
            return True
        return is_locked(fd) and not any(
            other.alive and other.state and other.state.base_identity == identity
            for other in runtime.all_devices() if other.name != name  # that one's lock is ours
        )
    except OSError:
        return True
    finally:
        os.close(fd)


def _is_claimed(path: str) -> bool:
    """Tell whether an exclusive open fails: what the kernel itself, or another namespace, holds."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.EBUSY
    os.close(fd)
    return False
