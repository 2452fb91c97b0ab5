"""FUA writes alone: a filesystem sends them without the flush that O_DSYNC on the disk brings.

Overwriting blocks of a file with O_DIRECT and O_DSYNC is one FUA write of the disk, if that has FUA
and nothing about the file needs the journal (fs/iomap/direct-io.c).
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
from support import ondisk
from support.blockstat import flushes_of
from support.direct import DirectFile, assert_same, read_direct
from support.shell import run

if TYPE_CHECKING:
    from support.device import Device

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4 * KIB
STRIPE = 64 * KIB
STRIPES = 32 * MIB // STRIPE
FILE_SIZE = 8 * MIB


class Disk(NamedTuple):
    """A cold disk with a mounted filesystem, and a file there that begins at byte `start` of it."""

    device: Device
    base: str
    file: DirectFile
    start: int

    def overwrite(self, at: int, data: bytes) -> None:
        """One FUA write of the disk, at this byte of it."""
        self.file.pwrite(data, at - self.start)


@pytest.fixture
def disk(ubi, undo, stores, tmp_path, seed):
    folder = stores.folder("ext4")
    image = folder / "image"
    (folder / "tree").mkdir()
    (folder / "tree" / "file").write_bytes(random.Random(seed).randbytes(FILE_SIZE))
    image.touch()
    os.truncate(image, STRIPES * STRIPE)
    run("mkfs.ext4", "-q", "-F", "-b", BLOCK, "-d", folder / "tree", image)
    first, last = (
        int(run("debugfs", "-R", f"bmap /file {block}", image).split()[-1])
        for block in (0, FILE_SIZE // BLOCK - 1)
    )
    assert last - first == FILE_SIZE // BLOCK - 1, "the file is in one piece"

    # A base on a disk where nobody else writes: its flushes are ours.
    base = stores.block("ubd", 8 * MIB + STRIPES * STRIPE)
    device = ubi.add(image, base, stripe_size=STRIPE, copy_on_read=False)
    point = tmp_path / "mnt"
    point.mkdir()
    run("mount", "-o", "noatime,commit=300,noinit_itable", device.node, point)
    undo.callback(run, "umount", point)
    run("sync", "-f", point)
    device.wait_until_committed()
    with DirectFile(str(point / "file"), os.O_RDWR | os.O_DSYNC) as file:
        yield Disk(device, base, file, first * BLOCK)


def stripes_of(disk: Disk) -> list[int]:
    """Every other stripe that lies in the file as a whole."""
    return list(range(-(-disk.start // STRIPE), (disk.start + FILE_SIZE) // STRIPE, 2))


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("length", [BLOCK, STRIPE], ids=["part", "whole"])
def test_of_a_cold_stripe_it_joins_a_round(disk, length):
    """One write and no flush, and when it returns the stripe's bit is on the base."""
    for number, stripe in enumerate(stripes_of(disk)[:20]):
        data = bytes([number + 1]) * length
        before = disk.device.status()
        assert stripe not in ondisk.read_bits(disk.base, STRIPES)
        disk.overwrite(stripe * STRIPE, data)
        assert stripe in ondisk.read_bits(disk.base, STRIPES)
        after = disk.device.status()
        assert after["io"]["write"]["count"] == before["io"]["write"]["count"] + 1
        assert after["io"]["flush"]["count"] == before["io"]["flush"]["count"]
        assert after["commit"]["joined"] == before["commit"]["joined"] + 1
        whole = after["hydration"]["whole_stripe_writes"]
        assert whole - before["hydration"]["whole_stripe_writes"] == (length == STRIPE)
        found = read_direct(disk.base, 8 * MIB + stripe * STRIPE, length)
        assert_same(found, data, stripe * STRIPE, "the base's data")


@pytest.mark.data_paths("zero-copy", "copy")
def test_of_a_durable_stripe_its_data_is_flushed_and_no_more(disk):
    stripe = stripes_of(disk)[0]
    disk.overwrite(stripe * STRIPE, b"\1" * BLOCK)
    before, flushes = disk.device.status(), flushes_of(disk.base)
    for number in range(10):
        disk.overwrite(stripe * STRIPE + number * BLOCK, bytes([number]) * BLOCK)
        assert flushes_of(disk.base) >= flushes + number + 1
    after = disk.device.status()
    assert after["io"]["write"]["count"] == before["io"]["write"]["count"] + 10
    assert after["io"]["flush"]["count"] == before["io"]["flush"]["count"]
    assert after["commit"] == before["commit"]
    assert after["queue_syncs"] == before["queue_syncs"]
