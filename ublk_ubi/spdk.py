"""A disk under SPDK: its bdev there, its vhost-user-blk controller; made, found again, taken away.

SPDK opens the stable link /dev/ublk-ubi/NAME by one of its own bdevs:

    uring   passes reads and writes only, never a flush: for disks that need none (writethrough)
    aio     passes flush, and UNMAP where told to use fallocate

Where a disk is attached stands in /run/ublk-ubi/NAME/spdk.json and goes with the disk. SPDK forgets
all when it ends: `attach` makes what is missing and leaves what is there, so it may be said again.

The requests are few and small: our own client does, which keeps to a time limit by the clock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
import struct
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from ublk_ubi import links, rpc
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.recovery import options_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.runtime import Device

Kind = Literal["uring", "aio"]
DEFAULT_SOCKET = "/var/tmp/spdk.sock"  # SPDK's own default
TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 5.0
_RECORD = "spdk.json"
_INTERNAL_ERROR = -32603  # what SPDK says of a controller that is not there
_NO_METHOD = -32601


class Attachment(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Where a disk is attached: SPDK's socket, its bdev there and its controller, if any."""

    socket: str
    bdev: str
    kind: Kind = "uring"
    fallocate: bool = False
    vhost: str | None = None
    cpumask: str | None = None


class Attached(NamedTuple):
    """What `attach` has seen to; `vhost_socket` is what a VMM connects to."""

    bdev: str
    vhost_socket: str | None
    made: bool


class There(msgspec.Struct, kw_only=True):
    """What SPDK has of an attachment at a moment; `problem` says what is wrong, if anything is."""

    name: str
    socket: str
    bdev: str
    kind: Kind
    vhost: str | None = None
    vhost_socket: str | None = None
    sessions: int | None = None
    problem: str | None = None


# what is asked for ---------------------------------------------------------------------------


def refuse_lossy(device: Device, kind: Kind) -> None:
    """Refuse a bdev that would let a guest's flush succeed and prove nothing. Raises UbiError."""
    if kind == "uring" and options_of(device).cache == "writeback":
        raise UbiError(
            f"{device.name} is a writeback disk, and SPDK's uring bdev never passes a flush: use "
            "--bdev aio, which does, or add the disk with --cache writethrough",
        )


def bdev_call(device: Device, wanted: Attachment) -> dict[str, Any]:
    """Return the call that makes the bdev, as SPDK's configuration has it."""
    params: dict[str, Any] = {"name": wanted.bdev, "filename": links.link_path(device.name)}
    if wanted.fallocate:
        params["fallocate"] = True
    return {"method": f"bdev_{wanted.kind}_create", "params": params}


def controller_call(wanted: Attachment) -> dict[str, Any]:
    """Return the call that makes the vhost-user-blk controller."""
    params = {"ctrlr": wanted.vhost, "dev_name": wanted.bdev}
    if wanted.cpumask is not None:
        params["cpumask"] = wanted.cpumask
    return {"method": "vhost_create_blk_controller", "params": params}


def configuration(wanted: list[tuple[Device, Attachment]]) -> dict[str, Any]:
    """Return a configuration for SPDK's --json. Raises UbiError for a disk that must not be so."""
    for device, attachment in wanted:
        refuse_lossy(device, attachment.kind)
    bdevs = [bdev_call(device, attachment) for device, attachment in wanted]
    controllers = [controller_call(attachment) for _, attachment in wanted if attachment.vhost]
    subsystems = [{"subsystem": "bdev", "config": bdevs}]
    if controllers:
        subsystems.append({"subsystem": "vhost_blk", "config": controllers})
    return {"subsystems": subsystems}


# what SPDK does ------------------------------------------------------------------------------


def call(socket: str, method: str, params: object = None, timeout_s: float = TIMEOUT_S) -> Any:
    """Ask SPDK. Raises RpcError with SPDK's own code, or NoAnswerError where it does not answer."""
    try:
        return rpc.call(socket, method, params, timeout_s)
    except rpc.NoAnswerError as error:
        raise rpc.NoAnswerError(
            f"SPDK does not answer: {error.message}; is it running, with -r {socket}?", error.code,
        ) from None
    except rpc.RpcError as error:
        raise rpc.RpcError(
            f"SPDK at {socket} refuses {method}: {error.message} ({error.rpc_code})",
            error.rpc_code,
        ) from None


def attach(device: Device, wanted: Attachment, timeout_s: float = TIMEOUT_S) -> Attached:
    """Have SPDK make what is missing of bdev and controller; both or, with a UbiError, neither."""
    refuse_lossy(device, wanted.kind)
    if not device.alive or device.starting:
        raise UbiError(f"{device.name} is not live: see `ublk-ubi status {device.name}`")
    with contextlib.ExitStack() as undo:
        made = _make_bdev(device, wanted, timeout_s)
        if made:
            undo.callback(_quietly, _delete_bdev, device, wanted, timeout_s)
        vhost_socket = None
        if wanted.vhost is not None:
            vhost_socket = _make_controller(wanted, timeout_s, undo)
        _remember(device, wanted)
        undo.pop_all()
    return Attached(wanted.bdev, vhost_socket, made)


def detach(device: Device, *, force: bool = False, timeout_s: float = TIMEOUT_S) -> None:
    """Take controller and bdev away from SPDK; one that does not run has neither.

    A controller that `attach` did not make stays, and serves nothing any more. Raises UbiError: not
    attached; busy while a VM is connected, without `force`, which takes its disk away. What has
    taken the name of one of them since, after SPDK restarted, is another's and stays.
    """
    found = attachment_of(device)
    if found is None:
        raise UbiError(f"{device.name} is not attached to SPDK: nothing to do")
    try:
        if not force:
            _refuse_connected(found, timeout_s)
        if found.vhost is not None:
            _delete_controller(found, timeout_s)
        _delete_bdev(device, found, timeout_s)
    except rpc.NoAnswerError as error:
        if error.code == Exit.TIMED_OUT:
            raise
    _forget(device)


def look(device: Device, timeout_s: float = ASK_TIMEOUT_S) -> There | None:
    """Tell what SPDK has of a disk; None if it is not attached. Never raises for what is wrong."""
    found = attachment_of(device)
    if found is None:
        return None
    there = There(
        name=device.name, socket=found.socket, bdev=found.bdev, kind=found.kind, vhost=found.vhost,
    )
    again = f"`ublk-ubi spdk attach {device.name}` makes it anew"
    try:
        file = _file_of_bdev(found, timeout_s)
        if file is None:
            there.problem = f"SPDK has no bdev {found.bdev}: {again}"
        elif file != links.link_path(device.name):
            there.problem = _foreign(found, file, links.link_path(device.name))
        else:
            serving = [one for one in _controllers_of(found, timeout_s)
                       if found.vhost in (None, one.get("ctrlr"))]
            if serving:
                there.vhost = serving[0].get("ctrlr")
                there.vhost_socket = serving[0].get("socket")
                there.sessions = len(serving[0].get("sessions") or ())
            elif found.vhost is not None:
                there.problem = f"SPDK has no controller {found.vhost} of {found.bdev}: {again}"
    except UbiError as error:
        there.problem = error.message
    return there


def rescan(device: Device, timeout_s: float = TIMEOUT_S) -> bool:
    """Let SPDK see a disk's new size; False if it is not attached. Raises UbiError."""
    found = attachment_of(device)
    if found is None:
        return False
    call(found.socket, f"bdev_{found.kind}_rescan", {"name": found.bdev}, timeout_s)
    return True


def _make_bdev(device: Device, wanted: Attachment, timeout_s: float) -> bool:
    """Make the bdev unless it is there; whether it was made."""
    request = bdev_call(device, wanted)
    link = request["params"]["filename"]
    found = _file_of_bdev(wanted, timeout_s)
    if found == link:
        return False
    if found is not None:
        raise UbiError(_foreign(wanted, found, link), Exit.BUSY)
    call(wanted.socket, request["method"], request["params"], timeout_s)
    return True


def _foreign(wanted: Attachment, file: str, link: str) -> str:
    return (f"SPDK at {wanted.socket} has a bdev {wanted.bdev} of {file or 'another kind'}, not a "
            f"{wanted.kind} bdev of {link}: delete it there first")


def _file_of_bdev(wanted: Attachment, timeout_s: float) -> str | None:
    """Name the file of the bdev that SPDK has: None if there is none, "" if of another kind."""
    try:
        (found,) = call(wanted.socket, "bdev_get_bdevs", {"name": wanted.bdev}, timeout_s)
    except rpc.RpcError as error:
        if error.rpc_code == -errno.ENODEV:
            return None
        raise
    except ValueError:
        return None
    return str(found.get("driver_specific", {}).get(wanted.kind, {}).get("filename", ""))


def _make_controller(
    wanted: Attachment, timeout_s: float, undo: contextlib.ExitStack,
) -> str | None:
    """Make the controller unless it is there; the path of its socket."""
    assert wanted.vhost is not None
    found = live_controller(wanted.socket, wanted.vhost, timeout_s)
    if found is None:
        request = controller_call(wanted)
        call(wanted.socket, request["method"], request["params"], timeout_s)
        undo.callback(_quietly, _delete_controller, wanted, timeout_s)
        found = find_controller(wanted.socket, wanted.vhost, timeout_s) or {}
    elif bdev_of(found) != wanted.bdev:
        raise UbiError(
            f"SPDK at {wanted.socket} has a controller {wanted.vhost} of "
            f"{bdev_of(found) or 'another kind'}, not of {wanted.bdev}: give another --vhost",
            Exit.BUSY,
        )
    return found.get("socket")


def live_controller(socket: str, name: str, timeout_s: float) -> dict[str, Any] | None:
    """Look for a controller; one whose bdev went is deleted, and is none. Raises UbiError."""
    found = find_controller(socket, name, timeout_s)
    if found is None or bdev_of(found) is not None:
        return found
    # It serves nothing any more. SPDK would hold the answer, and the wish, until its VM has left.
    if found.get("sessions"):
        raise UbiError(
            f"a VM whose disk was taken away is still connected to {name} "
            f"({found.get('socket')}): end it first, or give another --vhost",
            Exit.BUSY,
        )
    call(socket, "vhost_delete_controller", {"ctrlr": name}, timeout_s)
    return None


def find_controller(socket: str, name: str, timeout_s: float) -> dict[str, Any] | None:
    """Look for a controller by its name. Raises UbiError."""
    try:
        (found,) = call(socket, "vhost_get_controllers", {"name": name}, timeout_s)
    except rpc.RpcError as error:
        if error.rpc_code in (_INTERNAL_ERROR, -errno.ENODEV):
            return None
        raise
    except ValueError:
        return None
    return dict(found)


def bdev_of(controller: dict[str, Any]) -> str | None:
    """Name what a controller serves: None when that went away, "" if it is of another kind."""
    block = controller.get("backend_specific", {}).get("block")
    bdev = "" if block is None else block.get("bdev")
    return None if bdev is None else str(bdev)


def _refuse_connected(found: Attachment, timeout_s: float) -> None:
    """Refuse while a VM has the disk, by whosever controller. Raises UbiError."""
    for controller in _controllers_of(found, timeout_s):
        if controller.get("sessions"):
            raise UbiError(
                f"a VM is connected to {controller.get('ctrlr')} ({controller.get('socket')}): end "
                "it first, or take its disk away with --force",
                Exit.BUSY,
            )


def _controllers_of(found: Attachment, timeout_s: float) -> list[dict[str, Any]]:
    """List the controllers that serve a bdev; an SPDK without vhost has none."""
    try:
        there = call(found.socket, "vhost_get_controllers", {}, timeout_s)
    except rpc.RpcError as error:
        if error.rpc_code == _NO_METHOD:
            return []
        raise
    return [controller for controller in there if bdev_of(controller) == found.bdev]


def _delete_controller(found: Attachment, timeout_s: float) -> None:
    """Delete it, but while a VM is connected: then SPDK keeps it, and what it serves goes."""
    assert found.vhost is not None
    controller = find_controller(found.socket, found.vhost, timeout_s)
    if controller is None or controller.get("sessions"):
        return
    if bdev_of(controller) in (None, found.bdev):
        call(found.socket, "vhost_delete_controller", {"ctrlr": found.vhost}, timeout_s)


def _delete_bdev(device: Device, found: Attachment, timeout_s: float) -> None:
    if _file_of_bdev(found, timeout_s) != links.link_path(device.name):
        return
    try:
        call(found.socket, f"bdev_{found.kind}_delete", {"name": found.bdev}, timeout_s)
    except rpc.RpcError as error:
        if error.rpc_code != -errno.ENODEV:
            raise


def _quietly(action: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(UbiError):
        action(*arguments)


def process_of(path: str) -> int | None:
    """Tell whose socket it is; None if nobody listens."""
    with sockets.socket(sockets.AF_UNIX) as sock:
        sock.settimeout(ASK_TIMEOUT_S)
        try:
            with rpc.short_path(path) as short:
                sock.connect(short)
            found = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12)
        except OSError:
            return None
    return struct.unpack("=3i", found)[0] or None


# what is remembered --------------------------------------------------------------------------


def attachment_of(device: Device) -> Attachment | None:
    """Tell where a disk is attached, as far as we know. Raises UbiError for a damaged record."""
    path = os.path.join(device.folder, _RECORD)
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Attachment)
    except OSError:
        return None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise UbiError(f"{path} is damaged ({error}): remove it") from None


def _remember(device: Device, wanted: Attachment) -> None:
    temporary = os.path.join(device.folder, f".{_RECORD}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(msgspec.json.encode(wanted) + b"\n")
        os.rename(temporary, os.path.join(device.folder, _RECORD))
    except OSError as error:
        raise UbiError(f"{device.folder} cannot be written: {error.strerror}") from None


def _forget(device: Device) -> None:
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(device.folder, _RECORD))
