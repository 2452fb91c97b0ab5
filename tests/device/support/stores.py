"""Where images and bases of a test are: folders on filesystems, block devices of several kinds.

`Disks` lives as long as the run: the lab's disks (LAB_DISKS), or sparse files of its own where
there are none. The first carries ext4; the second XFS and, behind it, room for partitions.
`Stores` lives as long as a test and takes away all it gave.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.direct import block_size
from support.shell import run, until

if TYPE_CHECKING:
    import contextlib

    from support.mapper import Mapper
    from support.undo import Undo

MIB = 1 << 20
FOLDERS = ("ext4", "xfs", "tmpfs", "hostfs")
BLOCK_DEVICES = ("ubd", "ram", "loop", "dm")
SUBSTITUTE_SIZE = 4 << 30          # of a disk's stand-in, sparse
XFS_SIZE = 1 << 30
NULL_BLOCK = Path("/sys/kernel/config/nullb")

_numbers = itertools.count()


class Disks:
    """The disks of the whole run; filesystems on them are made when first asked for."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.made: set[str] = set()        # loop devices and mount points: no leak of any test's
        self._stack = stack
        self._given = os.environ.get("LAB_DISKS", "").split()
        self._disks: dict[int, str] = {}
        self._mounts: dict[str, Path] = {}
        self._xfs_partition: str | None = None

    @property
    def has_room_for_partitions(self) -> bool:
        return len(self._given) > 1

    def disk(self, number: int) -> str:
        """A whole disk: the lab's, or a loop device over a sparse file."""
        if number < len(self._given):
            return self._given[number]
        if number not in self._disks:
            path = self.folder / f"disk{number}"
            path.touch()
            os.truncate(path, SUBSTITUTE_SIZE)
            self._disks[number] = device = attach_loop(path)
            self.made.add(device)
            self._stack.callback(detach_loop, device)
        return self._disks[number]

    def mount(self, kind: str) -> Path:
        """The mount point of a filesystem."""
        if kind not in self._mounts:
            point = self.folder / kind
            point.mkdir()
            if kind == "tmpfs":
                run("mount", "-t", "tmpfs", "none", point)
            elif kind == "ext4":
                options = "lazy_itable_init=1,nodiscard"
                run("mkfs.ext4", "-q", "-F", "-m", 0, "-E", options, self.disk(0))
                run("mount", self.disk(0), point)
            else:
                run("mkfs.xfs", "-q", "-f", "-K", self._xfs_disk())
                run("mount", self._xfs_disk(), point)
            self._stack.callback(unmount, point)
            self._mounts[kind] = point
            self.made.add(str(point))
        return self._mounts[kind]

    def _xfs_disk(self) -> str:
        if not self.has_room_for_partitions:
            return self.disk(1)
        if self._xfs_partition is None:
            self._xfs_partition = add_partition(self.disk(1), 1, MIB, XFS_SIZE)
            self._stack.callback(run, "delpart", self.disk(1), 1)
            self.made.add(self._xfs_partition)
        return self._xfs_partition


class Stores:
    """Gives a test folders and block devices of its own."""

    def __init__(self, disks: Disks, mapper: Mapper, undo: Undo, prefix: str) -> None:
        self._disks = disks
        self._mapper = mapper
        self._undo = undo
        self._prefix = prefix
        self._partition_numbers = itertools.count(2)
        self._partition_end = MIB + XFS_SIZE + MIB

    def folder(self, kind: str = "ext4") -> Path:
        """An empty folder on ext4, xfs, tmpfs, or hostfs, the lab's, which has no O_DIRECT."""
        assert kind in FOLDERS, kind
        parent = self._scratch() if kind == "hostfs" else self._disks.mount(kind)
        folder = parent / f"{self._prefix}-{next(_numbers)}"
        folder.mkdir()
        self._undo.callback(shutil.rmtree, folder)
        return folder

    def block(self, kind: str, size: int, *, sector_size: int = 512) -> str:
        """A block device of `size` bytes that reads as zeros; its path.

        "ubd": a partition of a lab disk; "ram"; "loop": over a file on ext4; "dm": linear over ram.
        """
        assert size % sector_size == 0
        if kind == "ubd":
            return self._partition(size)
        if kind == "ram":
            return self._ram(size, sector_size)
        if kind == "loop":
            return self._loop(size, sector_size)
        assert kind == "dm", kind
        return self._mapper.map(self._ram(size, sector_size)).path

    def _scratch(self) -> Path:
        scratch = os.environ.get("LAB_SCRATCH")
        if not scratch:
            pytest.skip("needs tools/lab")
        return Path(scratch)

    def small(self, size: int) -> Path:
        """The mount point of an ext4 filesystem of `size` bytes that has all of it, and no more."""
        folder = self.folder("ext4")
        file = folder / "filesystem"
        file.touch()
        os.truncate(file, size)
        return self._mount_file(file, folder / "point")

    def hollow(self, size: int, room: int) -> tuple[Path, Path]:
        """The mount point of an ext4 filesystem that believes to have `size` bytes, of which only
        about `room` can be written; and the folder whose filesystem has no more."""
        outer = self.small(room)
        file = outer / "filesystem"
        file.touch()
        os.truncate(file, size)
        return self._mount_file(file, self.folder("ext4") / "point"), outer

    def _mount_file(self, file: Path, point: Path) -> Path:
        # No journal, as it would fill up; all of its tables are on the disk.
        run("mkfs.ext4", "-q", "-F", "-m", 0, "-O", "^has_journal,^resize_inode",
            "-E", "lazy_itable_init=0,nodiscard", file)
        point.mkdir()
        run("mount", self.loop_over(file), point)
        self._undo.callback(run, "umount", point)
        return point

    def loop_over(self, path: Path | str, *options: object) -> str:
        """A loop device over a file."""
        device = attach_loop(path, *options)
        self._undo.callback(detach_loop, device)
        return device

    def _loop(self, size: int, sector_size: int) -> str:
        path = self.folder("ext4") / "disk"
        path.touch()
        os.truncate(path, size)
        return self.loop_over(path, "--sector-size", sector_size)

    def _partition(self, size: int) -> str:
        if not self._disks.has_room_for_partitions:
            pytest.skip("needs two disks: tools/lab --disk 4G --disk 4G")
        disk = self._disks.disk(1)
        start, number = self._partition_end, next(self._partition_numbers)
        self._partition_end = -(-(start + size) // MIB) * MIB
        assert self._partition_end <= block_size(disk), "the lab's second disk is full"
        device = add_partition(disk, number, start, size)
        self._undo.callback(run, "delpart", disk, number)
        zero(device, size)
        return device

    def _ram(self, size: int, sector_size: int) -> str:
        """A null_blk that keeps what is written in memory."""
        if not NULL_BLOCK.is_dir():
            pytest.skip("needs null_blk and configfs")
        assert size % MIB == 0, "a RAM disk has whole MiB"
        folder = NULL_BLOCK / f"{self._prefix}-{next(_numbers)}"
        folder.mkdir()
        self._undo.callback(folder.rmdir)
        settings = {
            "memory_backed": 1, "size": size // MIB, "blocksize": sector_size, "discard": 1,
            "submit_queues": 2, "power": 1,
        }
        for name, value in settings.items():
            (folder / name).write_text(f"{value}\n")
        # Its index is what its node used to be called by; newer kernels take the folder's name.
        names = (folder.name, f"nullb{(folder / 'index').read_text().strip()}")
        return until(
            lambda: next((f"/dev/{name}" for name in names if os.path.exists(f"/dev/{name}")), ""),
            f"a node for {folder}",
        )


def add_partition(disk: str, number: int, start: int, size: int) -> str:
    """A partition that the kernel is told of and no table on the disk; its node."""
    run("addpart", disk, number, start // 512, size // 512)
    device = f"{disk}p{number}" if disk[-1].isdigit() else f"{disk}{number}"
    until(lambda: os.path.exists(device), f"{device} appears")
    return device


def zero(device: str, size: int) -> None:
    """Overwrite with zeros what an earlier test may have left."""
    with open(device, "r+b", buffering=0) as file:
        for offset in range(0, size, MIB):
            os.pwrite(file.fileno(), bytes(min(MIB, size - offset)), offset)
        os.fsync(file.fileno())


def unmount(point: Path) -> None:
    """Unmount what the last test may have left busy: a killed process's rings go after it."""
    words = ["umount", str(point)]
    until(lambda: subprocess.run(words, check=False, capture_output=True).returncode == 0,
          f"{point} can be unmounted")


def attach_loop(path: Path | str, *options: object) -> str:
    return run("losetup", "--find", "--show", *options, path)


def detach_loop(device: str) -> None:
    run("losetup", "--detach", device)
    backing = Path("/sys/block", os.path.basename(device), "loop/backing_file")
    until(lambda: not backing.exists(), f"{device} lets go of its file")
