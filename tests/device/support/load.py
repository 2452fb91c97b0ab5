"""Writers that know of every sector what they wrote last, and whether it was completed.

The disk is cut up so that no sector has two writers and nearly every stripe has all of them: blocks
of 4 KiB go round the writers, but for every fourth stripe, which one writer has for itself and
writes as a whole, too. Each sector says which it is, who wrote it and with which number.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import threading
import time
from typing import TYPE_CHECKING

from support.direct import CHUNK, SECTOR, DirectFile
from support.shell import until

if TYPE_CHECKING:
    from support.device import Device

BLOCK = 4096
_MARK = struct.Struct("<8sQQQ")
_MAGIC = b"WRITTEN\n"
_PER_SECTOR = SECTOR // _MARK.size
WHOLE = 4                          # every so many stripes one is written as a whole


class Record:
    """Of every sector: the number of the last write that completed, and of those tried since.

    What lies before `start`, bytes, is somebody else's.
    """

    def __init__(self, image: bytes, size: int, stripe: int, *, start: int = 0) -> None:
        self.start = start
        self.image = image + bytes(size - len(image))
        self.size = size
        self.stripe = stripe
        self.done = [0] * (size // SECTOR)
        self.tried: list[list[int]] = [[] for _ in self.done]

    def grow(self, size: int) -> None:
        """The disk has so many bytes now; what is new of it reads zero."""
        more = size - self.size
        self.image += bytes(more)
        self.done += [0] * (more // SECTOR)
        self.tried += [[] for _ in range(more // SECTOR)]
        self.size = size               # last: writers look at it

    def check(self, device: Device, *, forget: bool = True) -> int:
        """Compare every sector of a device; returns how many hold a write of which we knew nothing.

        What is found is then what counts: a write that failed is there or not, for good.
        """
        surprises = 0
        with device.open(os.O_RDONLY) as disk:
            for start in range(self.start, self.size, CHUNK):
                found = disk.pread(start, min(CHUNK, self.size - start))
                for at in range(0, len(found), SECTOR):
                    sector = (start + at) // SECTOR
                    number = self._number(found[at : at + SECTOR], sector)
                    surprises += number != self.done[sector]
                    if forget:
                        self.done[sector], self.tried[sector] = number, []
        return surprises

    def _number(self, found: bytes, sector: int) -> int:
        """Which of the writes that may be there is there."""
        magic, where, number, _ = _MARK.unpack_from(found)
        if magic != _MAGIC:
            start = sector * SECTOR
            assert found == self.image[start : start + SECTOR], (
                f"sector {sector} holds neither a write nor the image: {found[:32].hex()}"
            )
            number = 0
        else:
            assert where == sector, f"sector {sector} holds what was written to {where}"
            assert found == found[: _MARK.size] * _PER_SECTOR, f"sector {sector} is torn"
        may = [self.done[sector], *self.tried[sector]]
        assert number in may, (
            f"sector {sector} (stripe {sector * SECTOR // self.stripe}) holds write {number}; "
            f"write {may[0]} was completed, {may[1:]} were tried"
        )
        return number


class Writers:
    """Threads that write, read and flush until they are stopped or the disk goes away."""

    def __init__(
        self, device: Device, record: Record, *, threads: int, seed: int, first: int,
        flush_every: int = 40,
    ) -> None:
        """`first` is the number of the first write: higher than any before."""
        self._record = record
        self._threads = threads
        self._flush_every = flush_every
        self._stop = threading.Event()
        self.completed = [0] * threads
        self.longest_s = [0.0] * threads           # of a request
        self.next_number = first
        self._numbers = threading.Lock()
        self.failed: list[OSError] = []
        self._workers = [
            threading.Thread(
                target=self._work, args=(device.node, index, random.Random(seed + index)),
                daemon=True,
            )
            for index in range(threads)
        ]
        for worker in self._workers:
            worker.start()

    def wait_for(self, writes: int, timeout_s: float = 60.0) -> None:
        """Wait until so many writes have completed."""
        until(
            lambda: sum(self.completed) >= writes or self.failed, f"{writes} writes", timeout_s,
        )

    def join(self, *, stop: bool = False, timeout_s: float = 30.0) -> None:
        """Wait until all have ended: by themselves, as the disk is gone, or told to."""
        if stop:
            self._stop.set()
        for worker in self._workers:
            worker.join(timeout_s)
            assert not worker.is_alive(), "a writer hangs"

    def _work(self, path: str, index: int, rng: random.Random) -> None:
        buffer = mmap.mmap(-1, self._record.stripe)
        try:
            with DirectFile(path) as disk:
                while not self._stop.is_set():
                    started_at = time.monotonic()
                    self._step(disk, index, rng, buffer)
                    took_s = time.monotonic() - started_at
                    self.longest_s[index] = max(self.longest_s[index], took_s)
        except OSError as error:
            self.failed.append(error)

    def _step(self, disk: DirectFile, index: int, rng: random.Random, buffer: mmap.mmap) -> None:
        dice = rng.random()
        if dice < 1 / self._flush_every:
            disk.fsync()
        elif dice < 0.1:
            with memoryview(buffer) as view, view[:BLOCK] as data:
                first, end = self._record.start // BLOCK, self._record.size // BLOCK
                at = rng.randrange(first, end) * BLOCK
                if os.preadv(disk.fd, [data], at) == 0:
                    raise OSError(errno.ENODEV, "the disk has no size any more")
        else:
            start, length = self._choose(index, rng)
            self._write(disk, start, length, buffer)
            self.completed[index] += 1

    def _choose(self, index: int, rng: random.Random) -> tuple[int, int]:
        """Bytes that are this writer's own, inside one stripe."""
        stripe_size = self._record.stripe
        while True:
            stripe = rng.randrange(
                self._record.start // stripe_size, self._record.size // stripe_size,
            )
            if stripe % WHOLE == WHOLE - 1:
                if stripe // WHOLE % self._threads != index:
                    continue
                return stripe * stripe_size, stripe_size
            block = rng.randrange(stripe_size // BLOCK)
            if (stripe + block) % self._threads != index:
                continue
            first = rng.randrange(BLOCK // SECTOR)
            count = rng.randint(1, BLOCK // SECTOR - first)
            return stripe * stripe_size + block * BLOCK + first * SECTOR, count * SECTOR

    def _write(self, disk: DirectFile, start: int, length: int, buffer: mmap.mmap) -> None:
        with self._numbers:
            number = self.next_number
            self.next_number += 1
        sectors = range(start // SECTOR, (start + length) // SECTOR)
        for position, sector in enumerate(sectors):
            mark = _MARK.pack(_MAGIC, sector, number, length)
            buffer[position * SECTOR : (position + 1) * SECTOR] = mark * _PER_SECTOR
            self._record.tried[sector].append(number)
        with memoryview(buffer) as view, view[:length] as data:
            written = os.pwritev(disk.fd, [data], start)
        assert written == length
        for sector in sectors:
            self._record.done[sector] = number
            self._record.tried[sector] = []
