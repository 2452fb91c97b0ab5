"""What `serve` does to disks: all of it may wait, on any thread, and uses what the commands use.

Errors are RpcErrors with a negative errno, as SPDK has them; the words are those of the commands.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
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
    from collections.abc import Callable

    from ublk_ubi.runtime import Device
    from ublk_ubi.status import Status

BLOCK_SIZES = (512, 4096)
RESIZE_TIMEOUT_S = 3600.0
DELETE_TIMEOUT_S = removal.DEFAULT_TIMEOUT_S
WAIT_INTERVAL_S = 0.5

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
        if self._is_there(params):
            return params.name
        return self.make(params, self.begin(params))

    def begin(self, params: UbiParams) -> Base:
        """Take its name and base for a disk, without waiting: `make`, or the book's `end`, follows.

        Raises RpcError.
        """
        self._complete(params)
        return self.book.begin(params)

    def _complete(self, params: UbiParams) -> None:
        params.image_path = os.path.abspath(params.image_path)

    def make(self, params: UbiParams, base: Base) -> str:
        """Make a disk, and its bdev in SPDK if there is one; nothing of it stays if that fails."""
        made, uuid = False, None
        try:
            adopted = self._start(params, base)
            made = True
            if adopted:
                self._report(f"{params.name}: adopted a disk of bdev_ubi's, {base.path}")
            if self.spdk_socket is not None:
                try:
                    self.attach(params)
                except BaseException:
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
            if found is not None and found.socket == self.spdk_socket:
                spdk.detach(device, force=True)
            removal.remove_device(device, force=False, timeout_s=DELETE_TIMEOUT_S)
        except UbiError as error:
            raise coded(error, errno.EIO) from None
        self.book.forget(name)
        self._report(f"{name}: deleted")
        return True

    def attach(self, params: UbiParams) -> None:
        """Have SPDK make the bdev of a disk; one that flushes, where that is needed."""
        assert self.spdk_socket is not None
        device = links.resolve(params.name)
        kind: Kind = "aio" if params.cache_mode == "writeback" else "uring"
        spdk.attach(device, spdk.Attachment(
            socket=self.spdk_socket, bdev=params.name, kind=kind,
        ))

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
        """Pass a vhost call on to SPDK, and remember what it made. Raises SPDK's own error."""
        assert self.spdk_socket is not None
        name = params.get("ctrlr")
        makes = method in ("vhost_create_blk_controller", "vhost_create_scsi_controller")
        with _coded():
            if makes and found_ok and isinstance(name, str) and self._has_controller(name):
                self._report(f"{name}: SPDK has it already")
                result: Any = True
            else:
                result = spdk.call(self.spdk_socket, method, params)
        if makes and isinstance(name, str):
            self.book.add_controller(name, {"method": method, "params": params})
        elif method == "vhost_delete_controller" and isinstance(name, str):
            self.book.drop_controller(name)
        return result

    def _has_controller(self, name: str) -> bool:
        assert self.spdk_socket is not None
        found = spdk.find_controller(self.spdk_socket, name, spdk.ASK_TIMEOUT_S)
        return found is not None and bool(
            found.get("backend_specific", {}).get("block", {}).get("bdev")
            or "scsi" in found.get("backend_specific", {}),
        )

    def attach_again(self) -> None:
        """Give SPDK what it had before it restarted. Errors are told, and hold up nothing."""
        assert self.spdk_socket is not None
        for device in runtime.all_devices():
            try:
                found = spdk.attachment_of(device)
                ours = found is not None and found.socket == self.spdk_socket and device.alive
                if found is not None and ours and spdk.attach(device, found).made:
                    self._report(f"{device.name}: SPDK has its bdev again")
            except UbiError as error:
                self._report(f"{device.name}: {error.message}")
        for call in self.book.controllers():
            name = call["params"]["ctrlr"]
            try:
                if not self._has_controller(name):
                    spdk.call(self.spdk_socket, call["method"], call["params"])
                    self._report(f"{name}: SPDK has this controller again")
            except UbiError as error:
                self._report(f"{name}: {error.message}")


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
