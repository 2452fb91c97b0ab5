"""What is done to a disk, and how often: runs of fio that end after so many requests.

The clock counts instructions, so a figure needs as many requests as make its last digit steady:
fio tells time in milliseconds, and a run of 300 of them has a third of a per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20
IMAGE_BYTES = 64 * MIB              # of the image, and of each disk

RATE, BANDWIDTH = "IO/s", "MB/s"
INSTRUCTIONS, DELAY, SYNCS = "G instructions", "ms", "fdatasyncs per 1,000 fsyncs"
LESS_IS_BETTER = frozenset({INSTRUCTIONS, DELAY, SYNCS})


@dataclass(frozen=True)
class Load:
    """One run of fio. `count` is of requests; `fixed`: a smaller dose is another measurement."""

    name: str
    rw: str
    count: int
    depth: int = 32
    block: int = 4 * KIB
    unit: str = RATE
    fixed: bool = False
    size: int = IMAGE_BYTES
    more: tuple[str, ...] = ()

    def requests(self, divisor: int) -> int:
        """Tell how many requests are made in a dose that is `divisor` times smaller."""
        return self.count if self.fixed else self.count // divisor

    def words(self, node: str, count: int) -> list[str]:
        """Write the command, but for the program."""
        return [
            "--name=load", f"--filename={node}", "--ioengine=io_uring", "--direct=1", "--thread",
            f"--rw={self.rw}", f"--bs={self.block}", f"--iodepth={self.depth}",
            f"--size={self.size}", f"--io_size={count * self.block}", f"--number_ios={count}",
            "--randrepeat=1", "--output-format=json", *self.more,
        ]  # fmt: skip


REGIONS_64K, REGIONS_1M = IMAGE_BYTES // (64 * KIB), IMAGE_BYTES // MIB

ALL = (
    Load("randread-32", "randread", 65536),
    Load("randwrite-32", "randwrite", 65536),
    Load("randread-1", "randread", 32768, depth=1),
    Load("read-1m", "read", 512, depth=4, block=MIB, unit=BANDWIDTH),
    Load("write-fsync-1", "randwrite", 8192, depth=1, more=("--fsync=1",)),
    # Once over a disk that has nothing yet.
    Load("cold-read-1m", "read", REGIONS_1M, depth=4, block=MIB, unit=BANDWIDTH, fixed=True),
    Load("cold-randread-32", "randread", 4096, fixed=True),
    # A write in each region, none written twice.
    Load("first-touch-64k", "write:60k", REGIONS_64K, depth=1, fixed=True),
    Load("first-touch-1m", "write:1020k", REGIONS_1M, depth=1, fixed=True),
)
BY_NAME = {load.name: load for load in ALL}
