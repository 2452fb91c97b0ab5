"""The guest's ram disks. All are as large, and all of each has been written.

The image is a partition of one, 16 MiB smaller than a base, as no two ram disks differ in size:
8 MiB for a base's metadata, and as much for the headers of others' formats.
"""

from __future__ import annotations

import random

from .loads import IMAGE_BYTES, MIB
from .shell import run

DISK_BYTES = IMAGE_BYTES + 16 * MIB
SECTOR = 512
IMAGE_DISK, IMAGE = "/dev/ram0", "/dev/ram0p1"
RAW, UBI, KUBLK, CLONE, CLONE_METADATA, QCOW, FILES = (f"/dev/ram{n}" for n in range(1, 8))
COUNT = 8


def make() -> None:
    """Make all disks, and the image's content: no two blocks alike, none zero."""
    run("modprobe", "-r", "brd")
    run("modprobe", "brd", f"rd_nr={COUNT}", f"rd_size={DISK_BYTES >> 10}", "max_part=4")
    content = random.Random(1).randbytes(MIB)
    turns = range(0, DISK_BYTES // MIB * SECTOR, SECTOR)
    for number in range(COUNT):
        with open(f"/dev/ram{number}", "wb", buffering=0) as disk:
            disk.writelines(content[at:] + content[:at] for at in turns)
        run("blockdev", "--flushbufs", f"/dev/ram{number}")
    run("addpart", IMAGE_DISK, "1", "0", str(IMAGE_BYTES // SECTOR))


def zero(node: str, size: int = 8 * MIB) -> None:
    """Zero a disk's beginning, so that nothing is found there."""
    with open(node, "wb", buffering=0) as disk:
        disk.writelines(bytes(MIB) for _ in range(size // MIB))
    run("blockdev", "--flushbufs", node)
