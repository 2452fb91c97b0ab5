"""What `serve` was told: names for paths, what disks were created with, SPDK's controllers.

Kept whole in /run/ublk-ubi/.serve.json, so that it outlives this process; the disks do so by
themselves, and none of it outlives the boot. That a disk exists says its folder alone (runtime): an
entry here counts only for a disk of that name on that base, and goes when there has been none for a
while.

Any thread may call it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ublk_ubi import runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import MAX_DEPTH, MAX_QUEUES, MAX_RATE, MIN_RATE
from ublk_ubi.rpc import RpcError

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device

GRACE_S = 120.0
"""How long an entry may be without its disk: a daemon that starts has none yet."""

Kind = Literal["aio", "uring"]


class UbiParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of `bdev_ubi_create`: bdev_ubi's own, then ours."""

    name: str
    base_bdev: str
    image_path: str
    stripe_size_kb: int | None = None
    stripe_size_mb: int | None = None
    no_sync: bool = False
    copy_on_read: bool = True
    directio: bool = True
    cache: Literal["writeback", "writethrough", "unsafe"] | None = None
    hydrate: bool = False
    rate: Annotated[int, msgspec.Meta(ge=MIN_RATE, le=MAX_RATE)] | None = None
    queues: Annotated[int, msgspec.Meta(ge=1, le=MAX_QUEUES)] = 1
    depth: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEPTH)] | None = None
    format: bool = False
    zero: bool = False
    keep_old_data: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; msgspec makes an error of the parameters of it."""
        if (self.stripe_size_kb is None) == (self.stripe_size_mb is None):
            raise ValueError("give one of stripe_size_kb and stripe_size_mb")
        if self.no_sync and self.cache not in (None, "unsafe"):
            raise ValueError(f"no_sync contradicts cache {self.cache!r}")

    @property
    def cache_mode(self) -> Literal["writeback", "writethrough", "unsafe"]:
        """Durable at each write, unless told: SPDK's uring bdev passes no flush."""
        return self.cache or ("unsafe" if self.no_sync else "writethrough")

    @property
    def stripe_size(self) -> int:
        """In bytes."""
        return (self.stripe_size_kb or 0) << 10 or (self.stripe_size_mb or 0) << 20


class Base(msgspec.Struct, kw_only=True):
    """A name for a path; `size` in bytes and `real`, without links, are of when it was told."""

    name: str
    kind: Kind
    path: str
    real: str
    size: int
    block_size: int | None = None
    readonly: bool = False
    uuid: str | None = None


class Disk(msgspec.Struct, kw_only=True):
    """A disk that was created here, on one of `paths`; `since` counts from the boot, in seconds."""

    params: UbiParams
    paths: tuple[str, str]
    since: float
    uuid: str | None = None


class _Told(msgspec.Struct, kw_only=True):
    version: int = 1
    bases: dict[str, Base] = msgspec.field(default_factory=dict)
    disks: dict[str, Disk] = msgspec.field(default_factory=dict)
    controllers: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)


def refuse(number: int, message: str, code: Exit = Exit.FAILED) -> RpcError:
    """Make an error with a negative errno, as SPDK has them."""
    return RpcError(message, -number, code)


class Book:
    """The entries, and the file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._making: set[str] = set()
        self._told = self._read()

    # bases ---------------------------------------------------------------------------------

    def bases(self) -> list[Base]:
        """All names for paths."""
        with self._lock:
            return list(self._told.bases.values())

    def base(self, name: str) -> Base:
        """Return one. Raises RpcError."""
        with self._lock:
            return self._base(name)

    def add_base(self, base: Base, *, found_ok: bool = False) -> None:
        """Give a path a name. Raises RpcError when the name is taken, but for the same path."""
        with self._lock:
            known = self._told.bases.get(base.name)
            if known is not None and found_ok and known.path == base.path:
                return
            if known is not None or base.name in self._making or _device(base.name) is not None:
                raise refuse(errno.EEXIST, f"bdev {base.name} exists already", Exit.BUSY)
            self._told.bases[base.name] = base
            try:
                self._write()
            except UbiError:
                del self._told.bases[base.name]
                raise

    def drop_base(self, name: str) -> None:
        """Take a name back."""
        with self._lock:
            self._told.bases.pop(name, None)
            self._write()

    def disks_on(self, base: Base) -> list[str]:
        """Name the disks that were created on a base and are there, or about to be."""
        with self._lock:
            return [
                name for name, disk in self._told.disks.items()
                if disk.params.base_bdev == base.name and self._counts(name, disk)
            ]

    def _base(self, name: str) -> Base:
        try:
            return self._told.bases[name]
        except KeyError:
            raise refuse(errno.ENODEV, f"no bdev {name!r}: bdev_aio_create or bdev_uring_create "
                         "gives a path a name", Exit.NO_DEVICE) from None

    # disks ---------------------------------------------------------------------------------

    def disk_of(self, device: Device) -> Disk | None:
        """Return what a disk was created with; None if not here."""
        with self._lock:
            disk = self._told.disks.get(device.name)
            return disk if disk is not None and _matches(device, disk) else None

    def begin(self, params: UbiParams) -> Base:
        """Take a name and a base for a disk that is about to be made. Raises RpcError."""
        runtime.check_name(params.name)
        with self._lock:
            base = self._base(params.base_bdev)
            disk = Disk(params=params, paths=(base.path, base.real), since=time.monotonic())
            device = _device(params.name)
            anothers = device is not None and device.state is not None and not (
                _matches(device, disk))
            if params.name in self._making or params.name in self._told.bases or anothers or (
                device is not None and device.alive
            ):
                raise refuse(errno.EEXIST, f"bdev {params.name} exists already", Exit.BUSY)
            for name, other in self._told.disks.items():
                same = name != params.name and base.real in other.paths
                if same and self._counts(name, other):
                    raise refuse(
                        errno.EPERM, f"bdev {base.name} is claimed by {name} already", Exit.BUSY,
                    )
            if base.readonly:
                raise refuse(errno.EINVAL, f"bdev {base.name} is read-only: a base is written to")
            self._making.add(params.name)
            # Before the daemon is there: it may outlive us.
            before = self._told.disks.get(params.name)
            self._told.disks[params.name] = disk
            try:
                self._write()
            except UbiError:
                self._making.discard(params.name)
                del self._told.disks[params.name]
                self._told.disks |= {} if before is None else {params.name: before}
                raise
        return base

    def end(self, name: str, *, made: bool, uuid: str | None = None) -> None:
        """Tell how that went."""
        device = _device(name)
        with self._lock:
            self._making.discard(name)
            if made:
                disk = self._told.disks[name]
                disk.uuid = uuid
                if device is not None and device.state is not None:
                    disk.paths = (disk.paths[0], device.state.base)
            else:
                self._told.disks.pop(name, None)
            # What `begin` has written will do: the disk is there, or nobody finds it.
            with contextlib.suppress(UbiError):
                self._write()

    def adopt(self, params: UbiParams, base: Base) -> None:
        """Take a disk that runs for one that was created here."""
        with self._lock:
            self._told.disks[params.name] = Disk(
                params=params, paths=(base.path, base.real), since=time.monotonic(),
            )
            self._write()

    def forget(self, name: str) -> None:
        """Drop a disk that is gone; SPDK's controllers of it serve nothing, and it saves none."""
        with self._lock:
            controllers = {
                ctrlr: call for ctrlr, call in self._told.controllers.items()
                if call["params"].get("dev_name") != name
            }
            dropped = len(controllers) != len(self._told.controllers)
            self._told.controllers = controllers
            if self._told.disks.pop(name, None) is not None or dropped:
                self._write()

    # controllers -----------------------------------------------------------------------------

    def controllers(self) -> list[dict[str, Any]]:
        """Return the calls that made SPDK's controllers."""
        with self._lock:
            return [dict(call) for call in self._told.controllers.values()]

    def add_controller(self, name: str, call: dict[str, Any]) -> None:
        """SPDK has made one."""
        with self._lock:
            self._told.controllers[name] = call
            self._write()

    def drop_controller(self, name: str) -> None:
        """SPDK has deleted one."""
        with self._lock:
            if self._told.controllers.pop(name, None) is not None:
                self._write()

    # the file --------------------------------------------------------------------------------

    def _counts(self, name: str, disk: Disk) -> bool:
        """Tell whether an entry is of a disk that is there, or may be in a moment."""
        if name in self._making:
            return True
        device = _device(name)
        return device is not None and (device.starting or _matches(device, disk))

    def _write(self) -> None:
        """Keep what still counts; the lock is held."""
        now = time.monotonic()
        for name, disk in list(self._told.disks.items()):
            if now - disk.since > GRACE_S and not self._counts(name, disk):
                del self._told.disks[name]
        temporary = f"{self._path}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(msgspec.json.encode(self._told) + b"\n")
            os.rename(temporary, self._path)
        except OSError as error:
            raise UbiError(f"{self._path} cannot be written: {error.strerror}") from None

    def _read(self) -> _Told:
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(), type=_Told)
        except FileNotFoundError:
            return _Told()
        except OSError as error:
            raise UbiError(f"{self._path}: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise UbiError(f"{self._path} is damaged ({error}): remove it; disks stay") from None


def _device(name: str) -> Device | None:
    return runtime.find(name) if runtime.NAME_PATTERN.fullmatch(name) else None


def _matches(device: Device, disk: Disk) -> bool:
    return device.state is not None and device.state.base in disk.paths
