"""What lies on what: partitions, device-mapper, md, loop devices, mounted filesystems, swap.

Two questions are answered, both from sysfs and procfs alone:

- `overlap(a, b)`: do two files or devices share storage? Each is followed down to everything it
  lies on, as byte ranges (`Extent`). A partition or a loop device takes an exact range of what is
  below. A dm or md device, and a file of a filesystem, take some unknown part. Extents that meet
  are a conflict when one of them is exact: two files of one filesystem, or two logical volumes of
  one disk, are none, but a filesystem's file and its very device are one.
- `user_of(node)`: who uses it already? It is followed up: partitions, holders, loop devices, and
  the mounts and swap areas on any of them.

Not seen: filesystems without a device number of their own (btrfs, overlayfs, network), the
tables of two dm devices that map the same range, and mounts of other namespaces. For a block
device an exclusive open notices the last.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from . import blockdev
from .files import SECTOR_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

_END = 1 << 63


class Node(NamedTuple):
    """A block device (st_rdev, 0) or a regular file (st_dev, st_ino)."""

    is_device: bool
    device: int
    inode: int


class Extent(NamedTuple):
    """Bytes `start` to `end` of `node`, all of them (`exact`) or some."""

    node: Node
    start: int
    end: int
    exact: bool


class User(NamedTuple):
    """Who uses a device or file, and the command that ends it."""

    what: str
    way_out: str


class Loop(NamedTuple):
    """A bound loop device: `device` (st_rdev) shows bytes `start` to `end` of `backing`."""

    device: int
    backing: Node
    start: int
    end: int


def node_of(st: os.stat_result) -> Node:
    """Return the node of a stat result of a block device or regular file."""
    if stat.S_ISBLK(st.st_mode):
        return Node(is_device=True, device=st.st_rdev, inode=0)
    return Node(is_device=False, device=st.st_dev, inode=st.st_ino)


def _device_node(device: int) -> Node:
    return Node(is_device=True, device=device, inode=0)


def _read(*path: str) -> str | None:
    """Return a sysfs attribute, stripped; None when it is missing or the device just went."""
    try:
        with open("/".join(path), errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return None


def _number(*path: str) -> int:
    text = _read(*path)
    return int(text) if text and text.isdecimal() else 0


def _is_partition(folder: str) -> bool:
    return os.path.exists(f"{folder}/partition")


def _unescape(field: str) -> str:
    """Undo the octal escapes of mountinfo and swaps."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


class Topology(msgspec.Struct, frozen=True):
    """The machine's view; tests give folders of their own."""

    sys: str = "/sys"
    proc: str = "/proc"
    dev: str = "/dev"

    # devices ----------------------------------------------------------------------------------

    def folder(self, device: int) -> str | None:
        """Return the device's folder in sysfs; None when it has none."""
        link = f"{self.sys}/dev/block/{os.major(device)}:{os.minor(device)}"
        try:
            return os.path.realpath(link, strict=True)
        except OSError:
            return None

    def name(self, device: int) -> str:
        """Return the device's path: /dev/sda1; /dev/mapper/NAME for device-mapper."""
        folder = self.folder(device)
        if folder is None:
            return f"device {os.major(device)}:{os.minor(device)}"
        if mapped := _read(folder, "dm/name"):
            return f"{self.dev}/mapper/{mapped}"
        return f"{self.dev}/{os.path.basename(folder).replace('!', '/')}"

    def is_host_managed(self, device: int) -> bool:
        """Tell whether a zoned device takes only sequential writes."""
        folder = self._disk_folder(device)
        return folder is not None and _read(folder, "queue/zoned") == "host-managed"

    def offloads_zeroes(self, device: int) -> bool:
        """Tell whether the device zeroes a range without being sent the zeros."""
        folder = self._disk_folder(device)
        return folder is not None and _number(folder, "queue/write_zeroes_max_bytes") > 0

    def disk_of(self, device: int) -> int:
        """Return the disk (st_rdev) of a partition, or `device` itself."""
        folder = self._disk_folder(device)
        disk = None if folder is None else self._device_in(folder)
        return device if disk is None else disk

    def _disk_folder(self, device: int) -> str | None:
        folder = self.folder(device)
        if folder is not None and _is_partition(folder):
            return os.path.dirname(folder)
        return folder

    def _device_in(self, folder: str) -> int | None:
        text = _read(folder, "dev")
        if text is None:
            return None
        major, _, minor = text.partition(":")
        return os.makedev(int(major), int(minor))

    def _devices_in(self, folder: str) -> Iterator[int]:
        """Yield the devices whose sysfs folders, or links to them, are in `folder`."""
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(folder)):
                device = self._device_in(f"{folder}/{entry}")
                if device is not None:
                    yield device

    def _partitions(self, device: int) -> Iterator[int]:
        folder = self.folder(device)
        if folder is None:
            return
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(folder)):
                path = f"{folder}/{entry}"
                partition = self._device_in(path) if _is_partition(path) else None
                if partition is not None:
                    yield partition

    def loops(self) -> list[Loop]:
        """Return every bound loop device."""
        found: list[Loop] = []
        try:
            names = sorted(os.listdir(f"{self.sys}/block"))
        except OSError:
            return found
        for name in names:
            folder = f"{self.sys}/block/{name}"
            # Most have none.
            path = _read(folder, "loop/backing_file") if name.startswith("loop") else None
            device = None if path is None else self._device_in(folder)
            backing = None if path is None else self._loop_backing(name, path)
            if device is None or backing is None:
                continue
            start = _number(folder, "loop/offset")
            limit = _number(folder, "loop/sizelimit")
            found.append(Loop(device, backing, start, start + limit if limit else _END))
        return found

    def _loop_backing(self, name: str, path: str) -> Node | None:
        with contextlib.suppress(OSError):
            fd = os.open(f"{self.dev}/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                backing = blockdev.loop_backing(fd)
            finally:
                os.close(fd)
            if backing.st_rdev:
                return _device_node(backing.st_rdev)
            return Node(is_device=False, device=backing.st_dev, inode=backing.st_ino)
        with contextlib.suppress(OSError):
            return node_of(os.stat(path))
        return None

    # down -------------------------------------------------------------------------------------

    def extents(self, node: Node) -> list[Extent]:
        """Return `node` and all that it lies on."""
        loops = self.loops()
        extents = [Extent(node, 0, _END, exact=True)]
        for extent in extents:  # grows as it is walked
            extents += [below for below in self._below(extent, loops) if below not in extents]
        return extents

    def _below(self, extent: Extent, loops: list[Loop]) -> Iterator[Extent]:
        """Yield what `extent` takes of the next things down."""
        node = extent.node
        if not node.is_device:
            if self.folder(node.device) is not None:
                yield Extent(_device_node(node.device), 0, _END, exact=False)
            return
        for loop in loops:
            if loop.device == node.device:
                yield _shifted(extent, loop.backing, loop.start, loop.end)
        folder = self.folder(node.device)
        if folder is None:
            return
        if _is_partition(folder):
            start = _number(folder, "start") * SECTOR_SIZE
            end = start + _number(folder, "size") * SECTOR_SIZE
            yield _shifted(extent, _device_node(self.disk_of(node.device)), start, end)
        for slave in self._devices_in(f"{folder}/slaves"):
            yield Extent(_device_node(slave), 0, _END, exact=False)

    def overlap(self, a: Node, b: Node) -> Node | None:
        """Return what `a` and `b` share storage in; None when they are apart."""
        below_b = self.extents(b)
        for x in self.extents(a):
            for y in below_b:
                meet = max(x.start, y.start) < min(x.end, y.end)
                if x.node == y.node and meet and (x.exact or y.exact):
                    return x.node
        return None

    # up ---------------------------------------------------------------------------------------

    def user_of(self, node: Node, *, partitions: bool = True) -> User | None:
        """Return who uses `node`: mounts first, then swap, dm and md, loop devices.

        Without `partitions`, who uses partitions of `node` is not asked.
        """
        above = self._above(node, partitions=partitions)
        devices = [upper.device for upper, _ in above if upper.is_device]
        for device in devices:
            if point := self.mount_point(device):
                return User(
                    f"{self.name(device)} is mounted on {point}", f"`umount {point}` first",
                )
        for area in self._swap_areas():
            if any(area == upper for upper, _ in above):
                path = self.name(area.device) if area.is_device else "it"
                return User(f"{path} is used as swap", "`swapoff` it first")
        return next((user for _, user in above if user is not None), None)

    def _above(self, node: Node, *, partitions: bool) -> list[tuple[Node, User | None]]:
        """Return `node` and all that lies on it, each with the use it makes of what is below."""
        loops = self.loops()
        found: list[tuple[Node, User | None]] = [(node, None)]
        for lower, _ in found:  # grows as it is walked
            for upper, user in self._next_above(lower, loops, partitions=partitions):
                if all(upper != known for known, _ in found):
                    found.append((upper, user))
        return found

    def _next_above(
        self, node: Node, loops: list[Loop], *, partitions: bool,
    ) -> Iterator[tuple[Node, User | None]]:
        """Yield what lies on `node` itself."""
        for loop in loops:
            if loop.backing == node:
                path = self.name(loop.device)
                user = User(f"loop device {path} is attached to it", f"`losetup -d {path}` first")
                yield _device_node(loop.device), user
        folder = self.folder(node.device) if node.is_device else None
        if folder is None:
            return
        for partition in self._partitions(node.device) if partitions else ():
            yield _device_node(partition), None  # a partition by itself is no use
        for holder in self._devices_in(f"{folder}/holders"):
            path = self.name(holder)
            end = f"mdadm --stop {path}" if "/md" in path else f"dmsetup remove {path}"
            user = User(f"{self.name(node.device)} is part of {path}", f"`{end}` first")
            yield _device_node(holder), user

    def mount_point(self, device: int, *, writable_only: bool = False) -> str | None:
        """Return where the filesystem of a block device is mounted in this namespace."""
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in (_read(self.proc, "self/mountinfo") or "").splitlines():
            # 36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/sda1 rw,errors=continue
            left, _, right = line.partition(" - ")
            fields, tail = left.split(), right.split()
            if len(fields) < 6 or len(tail) < 3:
                continue
            if writable_only and "ro" in (fields[5].split(",")[0], tail[2].split(",")[0]):
                continue
            if fields[2] == number or self._is_device(_unescape(tail[1]), device):
                point = _unescape(fields[4])
                return point if point.isprintable() else repr(point)
        return None

    def _is_device(self, source: str, device: int) -> bool:
        """Tell whether a mount's source is `device`: btrfs and others mount under no number."""
        if not source.startswith(f"{self.dev}/"):
            return False
        with contextlib.suppress(OSError):
            st = os.stat(source)
            return stat.S_ISBLK(st.st_mode) and st.st_rdev == device
        return False

    def _swap_areas(self) -> Iterator[Node]:
        for line in (_read(self.proc, "swaps") or "").splitlines()[1:]:
            with contextlib.suppress(OSError, IndexError):
                yield node_of(os.stat(_unescape(line.split()[0])))

    # processes --------------------------------------------------------------------------------

    def lockers(self, st: os.stat_result) -> list[str]:
        """Return the processes that hold a flock(2) on a file: "process 12 (qemu)".

        The process that took the lock is named even when it is gone and the lock lives on.
        """
        key = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
        fields = (line.split() for line in (_read(self.proc, "locks") or "").splitlines())
        # 1: FLOCK  ADVISORY  WRITE 1234 fd:00:5678 0 EOF; a waiter has "->" in the second place
        return [
            self._process(parts[4])
            for parts in fields
            if len(parts) > 5 and parts[1] == "FLOCK" and parts[5] == key
        ]

    def openers(self, device: int, but: int | None = None) -> list[str]:
        """Return the other processes that have a block device open, but one of that number."""
        found = []
        for pid in sorted(os.listdir(self.proc)):
            if not pid.isdecimal() or int(pid) in (os.getpid(), but):
                continue
            with contextlib.suppress(OSError):
                folder = f"{self.proc}/{pid}/fd"
                links = (os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder))
                if any(self._is_device(link, device) for link in links):
                    found.append(self._process(pid))
        return found

    def _process(self, pid: str) -> str:
        command = _read(self.proc, pid, "comm")
        return f"process {pid} ({command or 'gone'})"


def _shifted(extent: Extent, node: Node, start: int, end: int) -> Extent:
    """Return `extent` on a device that shows bytes `start` to `end` of `node`, as seen there."""
    return Extent(
        node,
        min(start + extent.start, end),
        min(start + extent.end, end),
        exact=extent.exact,
    )
