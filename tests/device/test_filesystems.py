"""Filesystems on a device: made, filled, checked, reopened; and an image that is one."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from typing import TYPE_CHECKING

import pytest
from support.shell import run

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
SIZES = {"ext4": 64 * MIB, "xfs": 300 * MIB}   # of XFS the smallest that there is

MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(
        shutil.which(MAKE[kind][0]) is None, reason=f"needs {MAKE[kind][0]}",
    )) for kind in MAKE
]


@pytest.fixture
def mounted(undo, tmp_path):
    """Give a context in which a disk is mounted."""
    class Mounted:
        def __init__(self, node: str) -> None:
            self.node = node
            self.point = tmp_path / f"mnt{len(list(tmp_path.iterdir()))}"

        def __enter__(self) -> Path:
            self.point.mkdir()
            run("mount", self.node, self.point)
            self.is_mounted = True
            undo.callback(self.unmount)
            return self.point

        def __exit__(self, *_: object) -> None:
            self.unmount()

        def unmount(self) -> None:
            if self.is_mounted:
                run("umount", self.point)
                self.is_mounted = False

    return Mounted


def write_tree(root: Path, seed: int, files: int, folder: str = "folder") -> dict[str, str]:
    """Write files of all sizes up to 1 MiB, a few of them synced; their hashes by path."""
    rng = random.Random(seed)
    hashes = {}
    for number in range(files):
        path = root / f"{folder}{number % 7}" / f"file{number}"
        path.parent.mkdir(exist_ok=True)
        data = rng.randbytes(int(2 ** rng.uniform(0, 20)))
        with open(path, "wb") as file:
            file.write(data)
            if number % 10 == 0:
                os.fsync(file.fileno())
        hashes[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return hashes


def hash_tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*") if path.is_file()
    }


def digest(path: Path) -> str:
    """A hash of a sparse file's content: of every block that is not zero, and where it is."""
    found = hashlib.blake2b()
    with open(path, "rb") as file:
        for offset in range(0, os.fstat(file.fileno()).st_size, MIB):
            data = os.pread(file.fileno(), MIB, offset)
            if data.count(0) != len(data):
                found.update(f"{offset} ".encode())
                found.update(data)
    return found.hexdigest()


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpus(2)
def test_made_on_a_device(ubi, make_base, stores, mounted, seed, kind):
    path = stores.folder("ext4") / "image"
    path.touch()
    os.truncate(path, SIZES[kind])
    device = ubi.add(path, make_base(0), queues=2)
    run(*MAKE[kind], device.node)
    with mounted(device.node) as root:
        hashes = write_tree(root, seed, 60)
        run("sync", "-f", root)
        assert hash_tree(root) == hashes
    run(*CHECK[kind], device.node)

    device.reopen()
    run(*CHECK[kind], device.node)
    with mounted(device.node) as root:
        assert hash_tree(root) == hashes
        shutil.rmtree(root / "folder0")
        hashes = {name: hash_ for name, hash_ in hashes.items() if "folder0" not in name}
        hashes |= write_tree(root, seed + 1, 20, "more")
        run("sync", "-f", root)
        assert hash_tree(root) == hashes
    run(*CHECK[kind], device.node)
    assert os.stat(path).st_blocks == 0, "nothing was written to the image"


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpus(2)
def test_an_image_that_is_one(ubi, make_base, stores, mounted, seed, kind):
    path = stores.folder("xfs" if kind == "ext4" else "ext4") / "image"
    path.touch()
    os.truncate(path, SIZES[kind])
    run(*MAKE[kind], path)
    loop = stores.loop_over(path)
    with mounted(loop) as root:
        hashes = write_tree(root, seed, 80)
    before = digest(path)

    device = ubi.add(path, make_base(0), size=SIZES[kind] + 64 * MIB, queues=2)
    with mounted(device.node) as root:
        assert hash_tree(root) == hashes
        hashes |= write_tree(root, seed + 1, 20, "more")
    run(*CHECK[kind], device.node)
    device.reopen()
    run(*CHECK[kind], device.node)
    with mounted(device.node) as root:
        assert hash_tree(root) == hashes
    device.stop()
    assert digest(path) == before, "nothing was written to the image"
