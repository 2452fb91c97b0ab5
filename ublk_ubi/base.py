"""The base: the writable file or block device, found or made, checked and fenced.

Invariants of a `Base`:
- `fd` is the only descriptor that writes go through. Its open file description carries
  flock(LOCK_EX), and on a block device the exclusive claim of O_EXCL. Both end with the last
  reference to it, a ring's included: who gets them knows that every write of a previous daemon,
  killed or not, has landed.
- Nothing on the disk is changed here, but that a missing base is made: sparse, zero, mode 0600.
  `discard_if_created` takes it away again, until `keep` makes it last.
- No image is written: image and base share no storage.

The order matters: what can be refused without opening for writing is refused first; the size is
read after the lock is held, as another daemon may be making the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING, Self

import msgspec

from . import blockdev
from .bounds import other_image_size, refuse_too_small
from .errors import Exit, UbiError
from .fence import GRACE_S, Fence, is_locked
from .files import (
    SECTOR_SIZE,
    Identity,
    check_kind,
    check_path,
    enable_direct,
    identity_of,
    make_ready,
    open_failure,
    reopen,
    shown,
    size_of,
    size_text,
)
from .options import METADATA_SIZE
from .topology import Node, Topology, node_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from .image import Image

_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Base(msgspec.Struct):
    """An open base. Sizes and alignments are bytes; `alignment` is 1 when I/O is buffered."""

    path: str
    real_path: str
    fd: int
    size: int
    direct: bool
    alignment: int
    identity: Identity
    is_block: bool
    created: bool
    folder_fd: int | None
    warnings: list[str] = []
    _sync_fds: list[int] = []

    @property
    def data_size(self) -> int:
        """The bytes that a device of 512-byte blocks offers: size − 8 MiB, whole sectors."""
        return (self.size - METADATA_SIZE) // SECTOR_SIZE * SECTOR_SIZE

    def reopen_for_sync(self, count: int) -> list[int]:
        """Return `count` further open file descriptions, for fdatasync alone.

        A failed writeback is reported once to each description: a thread that syncs through one
        of its own cannot miss an error because another thread was told first. They carry neither
        lock nor claim, and `close` closes them. Raises UbiError.
        """
        fds: list[int] = []
        with contextlib.ExitStack() as undo:
            for _ in range(count):
                try:
                    fd = reopen(self.fd, os.O_RDWR)
                except OSError as error:
                    raise open_failure("base", self.path, error) from None
                undo.callback(os.close, fd)
                fds.append(fd)
            undo.pop_all()
        self._sync_fds += fds
        return fds

    def grow(self, size: int) -> None:
        """Make a file this large, in bytes; the new part reads zero. It is not durable yet.

        Raises UbiError.
        """
        if self.is_block:
            raise UbiError(
                f"base {shown(self.path)} is a block device of {size_text(size_of(self.fd))}, "
                f"{size_text(size)} are needed: grow it first, or leave the size out",
            )
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise UbiError(
                f"base {shown(self.path)} cannot be grown to {size_text(size)}: {error.strerror}",
            ) from None

    def sync_folder(self) -> None:
        """Make the name of a new base durable; it can be discarded still.

        Nothing happens for a base that was there. Raises UbiError when the folder cannot be synced.
        """
        if self.folder_fd is None:
            return
        try:
            os.fsync(self.folder_fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS, errno.EOPNOTSUPP):
                raise UbiError(
                    f"base {shown(self.path)}: its folder was not written to disk "
                    f"({error.strerror}); check the disk (see `dmesg`)",
                ) from None

    def keep(self) -> None:
        """Sync the folder of a new base and stop `discard_if_created` from removing it.

        Raises UbiError as `sync_folder` does; the base can be discarded then.
        """
        self.sync_folder()
        if self.folder_fd is not None:
            os.close(self.folder_fd)
            self.folder_fd = None

    def discard_if_created(self) -> None:
        """Close the base, and remove its file if it was made here and not kept.

        Only the very file that was made is removed, whatever has taken its name since. No harm
        when done twice.
        """
        if self.folder_fd is not None and self.fd >= 0:
            _remove(self.folder_fd, os.path.basename(self.real_path), self.fd)
        self.close()

    def close(self) -> None:
        """Let go of lock, claim and files; no harm when done twice."""
        for fd in (*self._sync_fds, self.folder_fd, self.fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._sync_fds.clear()
        self.folder_fd = None
        self.fd = -1

    def __enter__(self) -> Self:
        """Return the base; `with` closes it, and does not discard it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the base."""
        self.close()


def _silent(_message: str) -> None:
    """Drop a notice."""


def _no_holder(_identity: Identity) -> None:
    """Know of no live device."""


def open_base(
    path: str,
    *,
    image: Image | None,
    size: int | None,
    create_data_size: int,
    fence_timeout_s: float,
    holder: Callable[[Identity], str | None] = _no_holder,
    notice: Callable[[str], None] = _silent,
    topology: Topology | None = None,
    reach: str | None = None,
    anew: bool = False,
) -> Base:
    """Open a base for writing, or make it, and wait until all earlier writes to it have landed.

    `size` is the device's size that was asked for: a base that is there must have room for it. A
    missing base is made with `size`, else `create_data_size`, bytes of data behind its 8 MiB of
    metadata.
    `image` None is for a base that has all of its image: it must be there.
    `holder` names the live device that has the base of an identity: refused at once (BUSY).
    Otherwise a held base is waited for, `fence_timeout_s` seconds, then refused (TIMED_OUT);
    `notice` is told once when there is a wait to speak of. `reach` is where it is opened, where
    `path`, by which it is spoken of, is out of reach. `anew`: what is there does not count.

    Raises UbiError; then nothing is open, no lock is held and nothing on the disk is changed.
    """
    check_path("base", path)
    topology = topology or Topology()
    if size is not None and (size <= 0 or size % SECTOR_SIZE):
        raise UbiError(
            f"--size {size} is no size of a disk: give a multiple of {SECTOR_SIZE} bytes, such as "
            f"{max(size // SECTOR_SIZE + 1, 1) * SECTOR_SIZE}",
            Exit.USAGE,
        )
    fence = Fence(
        path, timeout_s=fence_timeout_s, holder=holder, notice=notice, topology=topology,
    )
    with contextlib.ExitStack() as undo:
        try:
            st = os.stat(reach or path)
        except FileNotFoundError as error:
            if os.path.lexists(path):
                raise open_failure("base", path, error) from None
            if image is None:
                raise UbiError(
                    f"base {shown(path)} does not exist, and no image says what it shall hold: "
                    "give --image, or another --base",
                ) from None
            data_size = create_data_size if size is None else size
            base = _create(path, image, data_size, fence, undo, enough=create_data_size)
        except OSError as error:
            raise open_failure("base", path, error) from None
        else:
            base = _open_existing(path, reach or path, st, image, fence, undo)
            _check_size(base, image, size, anew=anew)
        _make_direct(base)
        _check_block_size(base, image, size)
        undo.pop_all()
        return base


# opening and making -------------------------------------------------------------------------


def _open_existing(  # noqa: PLR0917 - all of open_base's, at once
    path: str, reach: str, st: os.stat_result, image: Image | None, fence: Fence,
    undo: contextlib.ExitStack,
) -> Base:
    """Open, lock and check a base that is there, at `reach`."""
    topology = fence.topology
    is_block = check_kind("base", path, st.st_mode)
    node = node_of(st)
    if image is not None:
        _refuse_shared_storage(path, node, image, topology)
    _refuse_user(path, node, topology)
    try:
        if is_block:
            fd = _open_device(path, reach, node, fence, undo)
        else:
            fd = os.open(reach, _OPEN_FLAGS)
            undo.callback(os.close, fd)
        opened = os.fstat(fd)
        if node_of(opened) != node:
            raise _replaced(path)
        make_ready(fd)
        identity = identity_of(fd, opened)
        fence.lock(fd, identity)
        try:
            now = node_of(os.stat(reach))
        except FileNotFoundError:
            raise _replaced(path) from None
        if now != node:
            raise _replaced(path)
        base_size = size_of(fd)
    except OSError as error:
        raise _write_failure(path, error) from None
    return Base(
        path=path,
        real_path=os.path.realpath(path),
        fd=fd,
        size=base_size,
        direct=False,
        alignment=1,
        identity=identity,
        is_block=is_block,
        created=False,
        folder_fd=None,
    )


def _open_device(
    path: str, reach: str, node: Node, fence: Fence, undo: contextlib.ExitStack,
) -> int:
    """Open a block device for writing, exclusively; wait for a previous daemon's claim to end."""
    probe = os.open(reach, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if blockdev.is_read_only(probe):
            raise UbiError(
                f"base {shown(path)} is a read-only block device: allow writing with `blockdev "
                f"--setrw {shown(path)}`, or name another device",
            )
        if fence.topology.is_host_managed(node.device):
            raise UbiError(
                f"base {shown(path)} is a host-managed zoned device, which takes no random "
                "writes: name another device, or put dm-zoned on it",
            )
        identity = identity_of(probe, os.fstat(probe))
        unlocked_since_s: float | None = None
        while True:
            try:
                fd = os.open(reach, _OPEN_FLAGS | os.O_EXCL)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                undo.callback(os.close, fd)
                return fd
            _refuse_user(path, node, fence.topology)
            _refuse_disk_user(path, node, fence.topology)
            if is_locked(probe):
                unlocked_since_s = None
            else:
                # A daemon's lock goes a moment before its claim. A claim that stays without a
                # lock is someone else's.
                now_s = time.monotonic()
                unlocked_since_s = unlocked_since_s or now_s
                waited = now_s - unlocked_since_s >= GRACE_S
                openers = fence.topology.openers(node.device) if waited else []
                if openers or fence.is_over:
                    raise _in_exclusive_use(path, openers)
            fence.pause(probe, identity)
    finally:
        os.close(probe)


def _create(
    path: str, image: Image, data_size: int, fence: Fence, undo: contextlib.ExitStack, *,
    enough: int,
) -> Base:
    """Make a sparse file of 8 MiB and `data_size` (`enough` of it: the image and no more).

    On any error it is removed again. It gets its name when it is as large as it should be: who is
    killed amid this leaves nothing, or a base that is new.
    """
    refuse_too_small(
        f"base {shown(path)}", METADATA_SIZE + data_size, f"image {shown(image.path)}", image.size,
        way_out=f"leave --size out, or give {enough} at least",
    )
    name = os.path.basename(path)
    if name in ("", ".", ".."):
        raise UbiError(
            f"base {shown(path)} names a folder, which does not exist either: name a file, such as "
            f"{shown(path.rstrip('/.') + '.base')}",
        )
    folder = os.path.dirname(path) or "."
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UbiError(
            f"base {shown(path)} cannot be made: its folder {shown(folder)} cannot be used "
            f"({error.strerror}); make the folder first, or name another",
        ) from None
    undo.callback(os.close, folder_fd)
    # A new file takes some part of what its folder lies on.
    _refuse_shared_storage(path, node_of(os.fstat(folder_fd)), image, fence.topology)
    parent = os.readlink(f"/proc/self/fd/{folder_fd}")
    if _holds_devices(parent, folder_fd, fence.topology.dev):
        raise UbiError(
            f"base {shown(path)} does not exist, and {shown(parent)} holds devices, not files: "
            "check the device's name (see `lsblk`), or name a file elsewhere",
        )
    try:
        fd = _open_new(folder_fd, name)
        undo.callback(os.close, fd)
        undo.callback(_remove, folder_fd, name, fd)
        make_ready(fd)
        identity = identity_of(fd, os.fstat(fd))
        fence.lock(fd, identity)
        os.ftruncate(fd, METADATA_SIZE + data_size)
        if os.fstat(fd).st_nlink == 0:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)
    except OSError as error:
        raise _creation_failure(path, METADATA_SIZE + data_size, error) from None
    return Base(
        path=path,
        real_path=os.path.join(parent, name),
        fd=fd,
        size=METADATA_SIZE + data_size,
        direct=False,
        alignment=1,
        identity=identity,
        is_block=False,
        created=True,
        folder_fd=folder_fd,
    )


def _open_new(folder_fd: int, name: str) -> int:
    """Make a file that has no name yet; where the filesystem has no such files, one that has."""
    try:
        return os.open(".", _OPEN_FLAGS | os.O_TMPFILE, 0o600, dir_fd=folder_fd)
    except OSError:
        return os.open(name, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder_fd)


def _holds_devices(parent: str, folder_fd: int, dev: str) -> bool:
    """Tell whether a folder is devtmpfs: a mistyped device must not become a file in memory."""
    with contextlib.suppress(OSError):
        dev = os.path.realpath(dev, strict=True)
        if os.path.commonpath((parent, dev)) == dev:
            return os.fstat(folder_fd).st_dev == os.stat(dev).st_dev  # /dev/shm is another
    return False


def _remove(folder_fd: int, name: str, fd: int) -> None:
    """Unlink the file behind `fd`, if it still has that name."""
    with contextlib.suppress(OSError):
        found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        if os.path.samestat(found, os.fstat(fd)):
            os.unlink(name, dir_fd=folder_fd)


def _make_direct(base: Base) -> None:
    """Turn O_DIRECT on, or note that there is none."""
    try:
        alignment = enable_direct(base.fd)
    except OSError as error:
        raise open_failure("base", base.path, error) from None
    base.direct = alignment > 0
    base.alignment = alignment or 1
    if not base.direct:
        base.warnings.append(
            f"base {shown(base.path)}: its filesystem has no O_DIRECT; it is written through the "
            "page cache",
        )


# refusals -----------------------------------------------------------------------------------


def _refuse_shared_storage(path: str, node: Node, image: Image, topology: Topology) -> None:
    """Refuse a base that is the image, or lies on it, or under it."""
    own = image.identity
    image_node = Node(own.is_block, own.device, 0 if own.is_block else own.number)
    shared = topology.overlap(image_node, node)
    if shared is None:
        return
    what = f"base {shown(path)}"
    if node == image_node:
        how = f"{what} is the image {shown(image.path)} itself"
    elif shared == image_node:
        how = f"{what} lies on the image {shown(image.path)}"
    elif shared == node:
        how = f"{what} is what the image {shown(image.path)} lies on"
    else:
        where = topology.name(shared.device) if shared.is_device else "one file"
        how = f"{what} and image {shown(image.path)} share storage on {where}"
    raise UbiError(f"{how}: writes would destroy the image; name another base")


def _refuse_user(path: str, node: Node, topology: Topology) -> None:
    """Refuse a base that is mounted, swapped on, or part of another device."""
    if user := topology.user_of(node):
        raise UbiError(
            f"base {shown(path)} is in use: {user.what}; {user.way_out}, or name another base",
            Exit.BUSY,
        )


def _refuse_disk_user(path: str, node: Node, topology: Topology) -> None:
    """Refuse a partition whose disk is used as a whole; other partitions' users do not matter."""
    disk = topology.disk_of(node.device)
    if disk != node.device:
        user = topology.user_of(node._replace(device=disk), partitions=False)
        if user is not None:
            raise UbiError(
                f"base {shown(path)} is on a disk in use: {user.what}; {user.way_out}, or name "
                "another base",
                Exit.BUSY,
            )


def _in_exclusive_use(path: str, openers: list[str]) -> UbiError:
    who = ", ".join(openers) or "another program or mount namespace"
    return UbiError(
        f"base {shown(path)} is in exclusive use by {who}: end that first (see `lsblk` and `fuser "
        f"-v {shown(path)}`), or name another base",
        Exit.BUSY,
    )


def _replaced(path: str) -> UbiError:
    return UbiError(
        f"base {shown(path)} was removed or replaced while it was being opened: try again",
        Exit.BUSY,
    )


def _write_failure(path: str, error: OSError) -> UbiError:
    """Return the refusal for an existing base that did not open for writing."""
    if error.errno == errno.EPERM:
        flags = 0
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            flags = blockdev.inode_flags(fd)
            os.close(fd)
        for flag, word, letter in (
            (blockdev.FS_IMMUTABLE_FL, "immutable", "i"),
            (blockdev.FS_APPEND_FL, "append-only", "a"),
        ):
            if flags & flag:
                return UbiError(
                    f"base {shown(path)} is marked {word}: `chattr -{letter} {shown(path)}`, or "
                    "name another base",
                )
    return open_failure("base", path, error)


def _creation_failure(path: str, size: int, error: OSError) -> UbiError:
    """Return the refusal for a base that could not be made."""
    what = f"base {shown(path)} cannot be made"
    reasons = {
        errno.EEXIST: "it appeared meanwhile; try again",
        errno.EFBIG: f"{size_text(size)} is more than a file may have there; give a smaller "
        "--size, or use a block device",
        errno.ENOSPC: "no space is left there; free some, or name another place",
        errno.EDQUOT: "the disk quota is used up; free some space, or name another place",
        errno.EACCES: f"uid {os.geteuid()} may not write in its folder; run as root, or allow it",
        errno.EPERM: "its folder does not allow it; look at `lsattr -d`, or name another place",
        errno.EROFS: "its filesystem is read-only; remount it read-write, or name another place",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror}; name another place")
    return UbiError(f"{what}: {reason}", Exit.BUSY if error.errno == errno.EEXIST else Exit.FAILED)


def _check_block_size(base: Base, image: Image | None, size: int | None) -> None:
    """Refuse a size that blocks as large as direct I/O needs do not make up."""
    unit = max(base.alignment, image.alignment if image is not None else 1)
    if size is not None and size % unit:
        with_image = f" with image {shown(image.path)}" if image is not None else ""
        raise UbiError(
            f"base {shown(base.path)}{with_image} makes a disk of blocks of "
            f"{unit} bytes, and --size {size} is no multiple: use --size {size // unit * unit}",
            Exit.USAGE,
        )


def _check_size(base: Base, image: Image | None, size: int | None, *, anew: bool) -> None:
    """Refuse a base that is too small; its metadata tell later whether it has the size asked."""
    if image is not None:
        try:
            refuse_too_small(
                f"base {shown(base.path)}", base.size, f"image {shown(image.path)}", image.size,
                way_out="name a larger device" if base.is_block else "name a larger base",
            )
        except UbiError as error:
            raise error if anew else _what_is_wrong(base, image, error) from None
    elif base.size <= METADATA_SIZE:
        raise UbiError(
            f"base {shown(base.path)} of {size_text(base.size)} is no disk of ours: give --image "
            "to make one on a larger base",
        )
    if size is not None and size > base.data_size:
        raise UbiError(
            f"base {shown(base.path)} makes a disk of {size_text(base.data_size)}, --size asks "
            f"for {size_text(size)}: leave --size out, or name another base",
        )


def _what_is_wrong(base: Base, image: Image, too_small: UbiError) -> UbiError:
    """Tell a disk that is given another image from a file that is too small for a new one.

    Only a file that holds nothing may be removed.
    """
    try:
        from .metadata import parse

        found = parse(os.pread(base.fd, METADATA_SIZE, 0))
    except (ImportError, OSError):  # a daemon that is shut in loads nothing
        return too_small
    extension = found.extension
    if extension is not None and extension.image_size != image.size:
        return other_image_size(
            f"base {shown(base.path)}", extension.image_size, f"image {shown(image.path)}",
            image.size,
        )
    if found.blank and not base.is_block:
        return UbiError(f"{too_small.message}, or remove {shown(base.path)} to have it made")
    return too_small
