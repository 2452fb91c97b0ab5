"""What `serve` does to disks: all of it may wait, on any thread, and uses what the commands use.

Errors are RpcErrors with a negative errno, as SPDK has them; the words are those of the commands.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ublk_ubi import background, blockdev, links, recovery, removal, rpc, runtime, spdk, status
from ublk_ubi.config import build_options
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.inspect import inspect_base
from ublk_ubi.launch import start_daemon
from ublk_ubi.rpc_server import FAILED
from ublk_ubi.serve.book import Base, Book, Kind, UbiParams, refuse
from ublk_ubi.watch import start_in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk_ubi.runtime import Device
    from ublk_ubi.status import Status

BLOCK_SIZES = (512, 4096)
RESIZE_TIMEOUT_S = 3600.0
DELETE_TIMEOUT_S = removal.DEFAULT_TIMEOUT_S
WAIT_INTERVAL_S = 0.5
START_WAIT_S = 60.0
START_POLL_S = 0.05
MAKING = ("vhost_create_blk_controller", "vhost_create_scsi_controller")

_ERRNO = {
    Exit.USAGE: errno.EINVAL,
    Exit.DEGRADED: errno.EIO,
    Exit.NO_DEVICE: errno.ENODEV,
    Exit.BUSY: errno.EBUSY,
    Exit.TIMED_OUT: errno.ETIMEDOUT,
}


class AioParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of `bdev_aio_create`; what is about SPDK's own I/O is taken and not used."""

    name: str
    filename: str
    block_size: int | None = None
    readonly: bool = False
    fallocate: bool = False
    uuid: str | None = None
    nowait: bool = False


class UringParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of `bdev_uring_create`."""

    name: str
    filename: str
    block_size: int | None = None
    uuid: str | None = None


def coded(error: UbiError, otherwise: int = errno.EINVAL) -> rpc.RpcError:
    """Give an error the errno that its exit code stands for; ours and SPDK's have theirs."""
    if isinstance(error, rpc.RpcError) and error.rpc_code != FAILED:
        return error
    return refuse(_ERRNO.get(error.code, otherwise), error.message, error.code)


class Disks:
    """Creates, deletes and asks. `report` gets a line for what an operator wants to know later."""

    def __init__(
        self, book: Book, report: Callable[[str], None], *, spdk_socket: str | None,
        interrupt_fd: int,
    ) -> None:
        self.book = book
        self._report = report
        self.spdk_socket = spdk_socket
        self._interrupt_fd = interrupt_fd

    # names for paths -------------------------------------------------------------------------

    def create_base(
        self, params: AioParams | UringParams, *, found_ok: bool = False,
    ) -> str:
        """Give a path a name. Raises RpcError."""
        kind: Kind = "aio" if isinstance(params, AioParams) else "uring"
        path = os.path.abspath(params.filename)
        if params.block_size is not None and params.block_size not in BLOCK_SIZES:
            raise refuse(
                errno.EINVAL,
                f"bdev {params.name}: block_size {params.block_size} cannot be had: 512 or 4096",
            )
        self.book.add_base(
            Base(
                name=params.name, kind=kind, path=path, real=os.path.realpath(path),
                size=_size_of(path), block_size=params.block_size, uuid=params.uuid,
                readonly=isinstance(params, AioParams) and params.readonly,
            ),
            found_ok=found_ok,
        )
        return params.name

    def delete_base(self, name: str, kind: Kind) -> bool:
        """Take a name back, with the disks on it, as SPDK does; one in use is refused."""
        base = self.book.base(name)
        if base.kind != kind:
            raise refuse(errno.ENODEV, f"bdev {name} is not of bdev_{kind}_create")
        for disk in self.book.disks_on(base):
            self.delete(disk)
        self.book.drop_base(name)
        return True

    # disks -----------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Tell whether there is a bdev of a name."""
        if any(base.name == name for base in self.book.bases()):
            return True
        return bool(runtime.NAME_PATTERN.fullmatch(name)) and runtime.find(name) is not None

    def create(self, params: UbiParams) -> str:
        """Make a disk, unless it is there already, on the same base. Raises RpcError."""
        self._complete(params)
        self._let_start(params.name)
        if not self._is_there(params):
            return self.make(params, self.begin(params))
        if self.spdk_socket is not None:
            with _coded():
                self.attach(params.name)
        return params.name

    def _let_start(self, name: str) -> None:
        """Wait for a daemon that is starting already, of a server that was killed, a while."""
        deadline, told = time.monotonic() + START_WAIT_S, False
        while (device := runtime.find(runtime.check_name(name))) is not None and device.starting:
            if not told:
                self._report(f"{name}: its daemon is starting: waiting for it")
            told = True
            left = min(START_POLL_S, deadline - time.monotonic())
            if left <= 0 or select.select([self._interrupt_fd], [], [], left)[0]:
                return

    def begin(self, params: UbiParams) -> Base:
        """Take its name and base for a disk, without waiting: `make`, or the book's `end`, follows.

        Raises RpcError.
        """
        self._complete(params)
        return self.book.begin(params)

    def _complete(self, params: UbiParams) -> None:
        params.image_path = os.path.abspath(params.image_path)

    def make(self, params: UbiParams, base: Base) -> str:
        """Make a disk, and its bdev in SPDK if there is one; nothing of it stays if that fails.

        One that waited for a daemon has one now, and stays: somebody may be using it.
        """
        made, uuid = False, None
        before = runtime.find(params.name)
        waited = before is not None and before.state is not None
        try:
            adopted = self._start(params, base)
            made = True
            if adopted:
                self._report(f"{params.name}: adopted a disk of bdev_ubi's, {base.path}")
            if self.spdk_socket is not None:
                try:
                    self.attach(params.name)
                except BaseException:
                    if not waited:
                        made = False
                        self._remove(runtime.find(params.name))
                    raise
            uuid = self._uuid(params.name)
        except UbiError as error:
            raise coded(error) from None
        finally:
            self.book.end(params.name, made=made, uuid=uuid)
        self._report(f"{params.name}: created on {base.path}, {params.cache_mode}")
        return params.name

    def delete(self, name: str) -> bool:
        """Take a disk away; refused while somebody but our SPDK uses it. Raises RpcError."""
        device = runtime.find(name) if runtime.NAME_PATTERN.fullmatch(name) else None
        if device is None:
            raise refuse(errno.ENODEV, f"no disk {name!r}", Exit.NO_DEVICE)
        try:
            found = spdk.attachment_of(device)
            if found is None or found.socket != self.spdk_socket:
                removal.remove_device(device, force=False, timeout_s=DELETE_TIMEOUT_S)
            else:
                self._delete_attached(device, found)
        except UbiError as error:
            raise coded(error, errno.EIO) from None
        self.book.forget(name)
        self._report(f"{name}: deleted")
        return True

    def _delete_attached(self, device: Device, found: spdk.Attachment) -> None:
        """Take a disk away from SPDK, then away; one that stays is SPDK's again."""
        process = spdk.process_of(found.socket)
        if process is not None:
            removal.refuse_if_used(device, but=process)
        spdk.detach(device, force=True)
        try:
            removal.remove_device(device, force=False, timeout_s=DELETE_TIMEOUT_S)
        except UbiError:
            with contextlib.suppress(UbiError):
                spdk.attach(device, found)
                for call in self.book.controllers():
                    if call["params"].get("dev_name") == found.bdev:
                        self._make_controller(call)
            raise

    def attach(self, name: str) -> None:
        """Have SPDK make the bdev of a disk: as it was, or one that flushes where that is needed.

        Raises UbiError; busy when another SPDK has it.
        """
        assert self.spdk_socket is not None
        device = links.resolve(name)
        wanted = spdk.attachment_of(device)
        if wanted is not None and wanted.socket != self.spdk_socket:
            there = spdk.look(device)
            if there is not None and there.problem is None:
                raise UbiError(
                    f"{name} is attached to SPDK at {wanted.socket}, not at {self.spdk_socket}: "
                    f"`ublk-ubi spdk detach {name}` first", Exit.BUSY,
                )
            wanted = None
        if wanted is None:
            writeback = recovery.options_of(device).cache == "writeback"
            kind: spdk.Kind = "aio" if writeback else "uring"
            wanted = spdk.Attachment(socket=self.spdk_socket, bdev=name, kind=kind)
        spdk.attach(device, wanted)

    def _start(self, params: UbiParams, base: Base) -> bool:
        """Start the daemon; whether it took over a disk that bdev_ubi made."""
        adopt = not params.format and inspect_base(base.path).kind == "bdev_ubi"
        ready = start_daemon(build_options({
            "name": params.name,
            "base": base.path,
            "image": params.image_path,
            "stripe_size": params.stripe_size,
            "block_size": base.block_size,
            "cache": params.cache_mode,
            "copy_on_read": params.copy_on_read,
            "image_cache": "none" if params.directio else "page",
            "adopt": adopt,
            **{key: getattr(params, key) for key in (
                "hydrate", "rate", "queues", "depth", "format", "zero", "keep_old_data", "force",
            )},
        }), interrupt_fd=self._interrupt_fd)
        for warning in ready.warnings:
            self._report(f"{params.name}: warning: {warning}")
        start_in_background(params.name)
        return adopt

    def _is_there(self, params: UbiParams) -> bool:
        """Tell whether the very disk runs already."""
        device = runtime.find(runtime.check_name(params.name))
        if device is None or not device.alive or device.state is None:
            return False
        base = self.book.base(params.base_bdev)
        disk = self.book.disk_of(device)
        if device.state.base not in (base.path, base.real):
            return False
        if disk is None:
            self.book.adopt(params, base)
            self._report(f"{params.name}: runs already, not started here")
        elif disk.params != params:
            self._report(f"{params.name}: runs already, with the parameters of before")
        else:
            self._report(f"{params.name}: runs already")
        return True

    def _remove(self, device: Device | None) -> None:
        """Take back a disk that was just made, and that nobody can have opened but SPDK."""
        if device is not None:
            with contextlib.suppress(UbiError):
                removal.remove_device(device, force=True, timeout_s=removal.FORCED_TIMEOUT_S)

    def _uuid(self, name: str) -> str | None:
        device = runtime.find(name)
        return status.status_of(device).uuid if device is not None else None

    # asking and steering ---------------------------------------------------------------------

    def status(self, name: str | None) -> Status | list[Status]:
        """Tell how one disk is doing, or all of them. Raises RpcError."""
        if name is None:
            return status.status_of_all(runtime.all_devices())
        return status.status_of(self._find(name))

    def hydrate(self, name: str, *, run: bool, rate: int | Literal["max"] | None) -> Status:
        """Start, go on with or pause background hydration; the status after that."""
        with _coded():
            return background.steer(self._find(name), run=run, rate=rate)

    def wait(self, name: str, timeout_s: float | None, wanted: Callable[[], bool]) -> Status | None:
        """Wait until a disk is independent of its image, as long as anybody `wanted` to know."""
        with _coded():
            for found in background.watch(
                self._find(name), timeout_s=timeout_s, interval_s=WAIT_INTERVAL_S,
            ):
                if found.independent:
                    return found
                if not wanted():
                    break
        return None

    def recover(self, name: str) -> dict[str, Any]:
        """Bring back a disk whose daemon died."""
        with _coded():
            ready = recovery.recover(self._find(name), interrupt_fd=self._interrupt_fd)
        self._report(f"{name}: recovered")
        return {"name": ready.name, "pid": ready.pid}

    def upgrade(self, name: str) -> dict[str, Any]:
        """Move a disk to the version that is installed."""
        with _coded():
            ready, pause_s = recovery.upgrade(self._find(name), interrupt_fd=self._interrupt_fd)
        rounded = None if pause_s is None else round(pause_s, 3)  # None: its unit did it
        self._report(f"{name}: upgraded, process {ready.pid}")
        return {"name": ready.name, "pid": ready.pid, "pause_s": rounded}

    def resize(self, name: str, size: int | None, *, keep_old_data: bool) -> dict[str, Any]:
        """Let a disk grow, and SPDK know where it is attached."""
        with _coded():
            device = self._find(name)
            params = {"size": size, "keep_old_data": keep_old_data}
            answer = rpc.call(device.socket, "resize", params, RESIZE_TIMEOUT_S)
        try:
            rescanned = spdk.rescan(device)
        except UbiError as error:
            rescanned = False
            self._report(f"{name}: has grown, and SPDK does not know: {error.message}")
        self._report(f"{name}: {answer['size']} bytes")
        return {"name": name, "size": answer["size"], "rescanned": rescanned}

    def _find(self, name: str) -> Device:
        with _coded():
            return links.resolve(name)

    # SPDK ------------------------------------------------------------------------------------

    def forward(self, method: str, params: dict[str, Any], *, found_ok: bool = False) -> Any:
        """Pass a vhost call on to SPDK, and remember what it made. Raises SPDK's own error.

        `found_ok`: a controller that is there already, of the same disk, will do.
        """
        assert self.spdk_socket is not None
        name = params.get("ctrlr")
        makes = method in MAKING and isinstance(name, str)
        call = {"method": method, "params": params}
        with _coded():
            if makes and found_ok:
                result: Any = True
                if not self._make_controller(call):
                    self._report(f"{name}: SPDK has it already")
            else:
                result = spdk.call(self.spdk_socket, method, params)
        if makes:
            self.book.add_controller(str(name), call)
        elif method == "vhost_delete_controller" and isinstance(name, str):
            self.book.drop_controller(name)
        return result

    def has_controller(self, name: str) -> bool:
        """Tell whether SPDK has a controller that serves something. Raises RpcError."""
        assert self.spdk_socket is not None
        with _coded():
            found = spdk.find_controller(self.spdk_socket, name, spdk.ASK_TIMEOUT_S)
        return found is not None and spdk.bdev_of(found) is not None

    def take_controller(self, name: str) -> None:
        """Take back one that was just made. Raises RpcError: busy while a VM is connected."""
        assert self.spdk_socket is not None
        with _coded():
            found = spdk.find_controller(self.spdk_socket, name, spdk.ASK_TIMEOUT_S)
            if found is not None and found.get("sessions"):
                raise UbiError(f"a VM is connected to {found.get('socket')}", Exit.BUSY)
        if found is not None:
            self.forward("vhost_delete_controller", {"ctrlr": name})

    def _make_controller(self, call: dict[str, Any]) -> bool:
        """Have SPDK make a controller unless it is there; whether it was made. Raises UbiError."""
        assert self.spdk_socket is not None
        name, wanted = call["params"]["ctrlr"], call["params"].get("dev_name", "")
        found = spdk.live_controller(self.spdk_socket, name, spdk.ASK_TIMEOUT_S)
        if found is None:
            spdk.call(self.spdk_socket, call["method"], call["params"])
            return True
        served = spdk.bdev_of(found)
        # Of bdevs that are SPDK's alone, another word may be an alias.
        if served != wanted and (not served or not wanted or self.has(str(wanted))):
            raise UbiError(
                f"SPDK has a controller {name} of {served or 'another kind'}, not of "
                f"{wanted or 'SCSI'}: delete it there first", Exit.BUSY,
            )
        return False

    def attach_again(self, told: set[str], only: set[str] | None = None) -> set[str]:
        """Give SPDK what it had before it restarted: what of that failed, for another try.

        `only` names what is to be tried. Errors are reported, unless in `told`, where they go.
        """
        failed = set()
        for what, again in self._had():
            if only is not None and what not in only:
                continue
            try:
                words = again()
            except UbiError as error:
                failed.add(what)
                words = error.message
            line = f"{what}: {words.removeprefix(f'{what} ')}"
            if words and line not in told:
                self._report(line)
            told |= {line} if what in failed else set()
        return failed

    def _had(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Yield what SPDK had, and what has it made again and gives the words for that, if any."""
        for device in runtime.all_devices():
            def bdev(device: Device = device) -> str:
                found = spdk.attachment_of(device)
                ours = found is not None and found.socket == self.spdk_socket
                made = found is not None and ours and spdk.attach(device, found).made
                return "SPDK has its bdev again" if made else ""

            yield device.name, bdev
        for call in self.book.controllers():
            def controller(call: dict[str, Any] = call) -> str:
                made = self._make_controller(call)
                return "SPDK has this controller again" if made else ""

            yield str(call["params"]["ctrlr"]), controller


@contextlib.contextmanager
def _coded() -> Any:
    """Give errors of the commands the errno that their exit codes stand for."""
    try:
        yield
    except UbiError as error:
        raise coded(error, errno.EIO) from None


def _size_of(path: str) -> int:
    """Return the size of a file or block device in bytes. Raises RpcError."""
    try:
        # Non-blocking, so that a FIFO does not hang; it is not read.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise refuse(error.errno or errno.EIO, f"{path}: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if stat.S_ISBLK(found.st_mode):
            return blockdev.size(fd)
        if stat.S_ISREG(found.st_mode):
            return found.st_size
    except OSError as error:
        raise refuse(error.errno or errno.EIO, f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)
    raise refuse(errno.EINVAL, f"{path} is neither a file nor a block device")
