"""Random operations on a disk from many threads at once, against a model of it in memory.

What overlapping requests in flight leave is anybody's guess, so no two threads are let near the
same sectors: each round *deals* extents of the disk. An extent belongs to one thread, which writes
and reads it, or to all, which read it. Extents are cut with no regard for stripes, most of them
small and close together: several threads are in the same stripe, on neighbouring sectors, nearly
all the time. A round keeps to a window of the disk that moves on, so that there are cold stripes to
the end.

A discarded sector may hold what it held or zeros, until it is read: from then on it is what was
found, as nothing of what these tests run on changes its mind. So the model knows of each sector
whether it may be zeros instead.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import random
import struct
import threading
from dataclasses import dataclass
from typing import NamedTuple

from support.direct import SECTOR, DirectFile, assert_same

MAX_LENGTH = 1 << 20
POOL_SIZE = 2 << 20                # random bytes that writes take their data from
ZEROS = bytes(SECTOR)

# <linux/fs.h>: ioctls that take two 64-bit words, start and length
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_RANGE = struct.Struct("=QQ")
# <linux/falloc.h>
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Extent(NamedTuple):
    start: int
    end: int


@dataclass
class Counts:
    """What was done."""

    reads: int = 0
    writes: int = 0
    durable_writes: int = 0
    whole_stripes: int = 0
    discards: int = 0
    wide_discards: int = 0             # … of them those of several stripes
    zeroes: int = 0                    # kept in place (BLKZEROOUT, ZERO_RANGE)
    unmapping_zeroes: int = 0          # … or given back (PUNCH_HOLE)
    flushes: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values()) - self.wide_discards

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Deal:
    """Who may do what where, for one round."""

    own: list[list[Extent]]
    shared: list[Extent]


def deal(rng: random.Random, window: Extent, threads: int, stripe: int) -> Deal:
    """Cut a window into extents and give them out.

    Two stripes are hot: cut into many small pieces, with a cut beside a border of theirs. Two other
    places are left whole, so that somebody has whole stripes. The window's ends are special, as one
    of them is the disk's.
    """
    cuts = {window.start, window.end}
    sectors = (window.end - window.start) // SECTOR
    for _ in range(2 * threads):
        cuts.add(window.start + rng.randrange(sectors) * SECTOR)
    for _ in range(2):
        start = window.start + rng.randrange(sectors) * SECTOR
        cuts -= {cut for cut in cuts if start < cut < start + 3 * stripe}
        cuts |= {start, min(start + 3 * stripe, window.end)}
    cuts |= {window.start, window.end}
    for _ in range(2):
        hot = (window.start + rng.randrange(sectors) * SECTOR) // stripe * stripe
        cuts |= {hot + rng.randrange(stripe // SECTOR) * SECTOR for _ in range(2 * threads)}
        cuts |= {hot, hot + stripe, hot + rng.choice((-1, 1)) * SECTOR}
    cuts |= {window.end - rng.randint(1, 16) * SECTOR, window.start + rng.randint(1, 16) * SECTOR}
    edges = sorted(cut for cut in cuts if window.start <= cut <= window.end)
    own: list[list[Extent]] = [[] for _ in range(threads)]
    shared = []
    for start, end in itertools.pairwise(edges):
        if rng.random() < 0.15:
            shared.append(Extent(start, end))
        else:
            rng.choice(own).append(Extent(start, end))
    return Deal(own, shared)


class Model:
    """A disk of `size` bytes at `path` and what it must hold: at first an image, then zeros.

    `run` does operations, `check` compares all of it.
    """

    def __init__(self, path: str, image: bytes, size: int, stripe: int, seed: int) -> None:
        self.path = path
        self.size = size
        self.stripe = stripe
        self.seed = seed
        self.content = mmap.mmap(-1, size)
        self.content[: len(image)] = image
        self.discarded = bytearray(size // SECTOR)     # 1: may be zeros instead
        self.counts = Counts()
        self.pool = mmap.mmap(-1, POOL_SIZE)
        self.pool[:] = random.Random(seed).randbytes(POOL_SIZE)

    def run(self, *, operations: int, threads: int, rounds: int) -> None:
        """Do about so many operations; raises what the first thread that failed has found."""
        rng = random.Random(self.seed)
        share = -(-operations // (rounds * threads))
        with contextlib.ExitStack() as stack:
            workers = [Worker(self, f"thread {index}") for index in range(threads)]
            for worker in workers:
                stack.callback(worker.close)
            for number in range(rounds):
                dealt = deal(rng, self._window(number, rounds), threads, self.stripe)
                for worker, own in zip(workers, dealt.own, strict=True):
                    worker.take(own, dealt.shared, rng.getrandbits(32), f"round {number}")
                self._run_round(workers, share)
        for worker in workers:
            self.counts.add(worker.counts)

    def check(self, what: str) -> None:
        """Compare the whole disk."""
        with DirectFile(self.path, os.O_RDONLY) as file:
            for offset in range(0, self.size, MAX_LENGTH):
                self.compare(file.pread(offset, min(MAX_LENGTH, self.size - offset)), offset, what)

    def compare(self, found: bytes | bytearray, offset: int, what: str) -> None:
        """See that a part of the disk is what it may be, and keep in mind what was found."""
        end = offset + len(found)
        sectors = range(offset // SECTOR, end // SECTOR)
        for sector in sectors:
            if self.discarded[sector]:
                at = sector * SECTOR
                if found[at - offset : at - offset + SECTOR] == ZEROS:
                    self.content[at : at + SECTOR] = ZEROS
                self.discarded[sector] = 0
        assert_same(bytes(found), self.content[offset:end], offset, what)

    def _window(self, number: int, rounds: int) -> Extent:
        """A part of the disk, half overlapping the one before; the last ends with the disk."""
        width = max(2 * self.size // (rounds + 1), 3 * self.stripe)
        step = (self.size - width) / max(1, rounds - 1)
        start = int(number * step) // SECTOR * SECTOR
        end = self.size if number == rounds - 1 else min(self.size, start + width)
        return Extent(start, end // SECTOR * SECTOR)

    def _run_round(self, workers: list[Worker], operations: int) -> None:
        failures: list[BaseException] = []

        def work(worker: Worker) -> None:
            try:
                worker.work(operations)
            except BaseException as failure:
                failures.append(failure)

        tasks = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        for task in tasks:
            task.start()
        for task in tasks:
            task.join()
        if failures:
            raise failures[0]


class Worker:
    """What one thread does."""

    def __init__(self, model: Model, name: str) -> None:
        flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
        self.model = model
        self.name = name
        self.where = name
        self.own: list[Extent] = []
        self.shared: list[Extent] = []
        self.counts = Counts()
        self._fd = os.open(model.path, flags)
        self._durable_fd = os.open(model.path, flags | os.O_DSYNC)
        self._buffer = mmap.mmap(-1, MAX_LENGTH)
        self._view = memoryview(self._buffer)
        self._pool = memoryview(model.pool)
        self._content = memoryview(model.content)
        self._discarded = memoryview(model.discarded)
        self._rng = random.Random()

    def take(self, own: list[Extent], shared: list[Extent], seed: int, when: str) -> None:
        """Be dealt one's part of a round."""
        self.own = own
        self.shared = shared
        self.where = f"{when}, {self.name}"
        self._rng = random.Random(seed)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._durable_fd)

    def work(self, operations: int) -> None:
        """Do so many operations."""
        if self.own:
            self._write_whole_stripe()  # while it may still be cold
        for _ in range(operations - 1):
            lot = self._rng.random()
            if lot < 0.35 or not self.own:
                self._read()
            elif lot < 0.60:
                self._write(self._fd, *self._place(self._rng.choice(self.own)))
                self.counts.writes += 1
            elif lot < 0.70:
                self._write(self._durable_fd, *self._place(self._rng.choice(self.own)))
                self.counts.durable_writes += 1
            elif lot < 0.78:
                self._write_whole_stripe()
            elif lot < 0.87:
                self._discard()
            elif lot < 0.97:
                self._zero()
            else:
                os.fsync(self._fd)
                self.counts.flushes += 1

    def _place(self, extent: Extent) -> tuple[int, int]:
        """Offset and length in an extent: small ones as likely as large ones, ends preferred."""
        room = (extent.end - extent.start) // SECTOR
        most = min(room, MAX_LENGTH // SECTOR)
        length = min(most, int(2 ** self._rng.uniform(0, most.bit_length())))
        lot = self._rng.random()
        if lot < 0.2:
            first = 0
        elif lot < 0.4:
            first = room - length
        else:
            first = self._rng.randrange(room - length + 1)
        return extent.start + first * SECTOR, length * SECTOR

    def _read(self) -> None:
        places = self.shared if not self.own or self._rng.random() < 0.3 else self.own
        if not places:
            return
        offset, length = self._place(self._rng.choice(places))
        count = os.preadv(self._fd, [self._view[:length]], offset)
        what = f"{self.where}: read {length} bytes at {offset}"
        assert count == length, f"{what}: {count}"
        sectors = self._discarded[offset // SECTOR : (offset + length) // SECTOR]
        if any(sectors) or _memcmp(
                address(self._buffer), address(self.model.content) + offset, length) != 0:
            self.model.compare(self._buffer[:length], offset, what)
        self.counts.reads += 1

    def _write(self, fd: int, offset: int, length: int) -> None:
        start = self._rng.randrange((POOL_SIZE - length) // SECTOR + 1) * SECTOR
        count = os.pwritev(fd, [self._pool[start : start + length]], offset)
        assert count == length, f"{self.where}: wrote {count} of {length} bytes at {offset}"
        self._content[offset : offset + length] = self._pool[start : start + length]
        self._settle(offset, length)

    def _settle(self, offset: int, length: int) -> None:
        """What is there is known again."""
        self._discarded[offset // SECTOR : (offset + length) // SECTOR] = bytes(length // SECTOR)

    def _discard(self) -> None:
        """Some sectors, or many stripes in one request."""
        extent = self._rng.choice(self.own)
        offset, length = self._place(extent)
        if self._rng.random() < 0.3:
            extent = max(self.own, key=lambda own: own.end - own.start)
            offset, length = extent.start, extent.end - extent.start
        fcntl.ioctl(self._fd, _BLKDISCARD, _RANGE.pack(offset, length))
        first, end = offset // SECTOR, (offset + length) // SECTOR
        self._discarded[first:end] = b"\1" * (end - first)
        self.counts.discards += 1
        stripe = self.model.stripe
        self.counts.wide_discards += offset // stripe != (offset + length - 1) // stripe

    def _zero(self) -> None:
        """By one of the three ways that there are."""
        offset, length = self._place(self._rng.choice(self.own))
        if self._rng.random() < 0.2 and (whole := self._whole_stripes()):
            offset, length = whole
        way = self._rng.randrange(3)
        if way == 0:
            fcntl.ioctl(self._fd, _BLKZEROOUT, _RANGE.pack(offset, length))
        else:
            mode = _KEEP_SIZE | (_PUNCH_HOLE if way == 1 else _ZERO_RANGE)
            if _fallocate(self._fd, mode, offset, length) != 0:
                raise OSError(ctypes.get_errno(), f"{self.where}: fallocate {mode:#x}")
        self._content[offset : offset + length] = bytes(length)
        self._settle(offset, length)
        if way == 1:
            self.counts.unmapping_zeroes += 1
        else:
            self.counts.zeroes += 1

    def _write_whole_stripe(self) -> None:
        """Whole stripes, exactly; whatever else if no extent has one."""
        if whole := self._whole_stripes():
            self._write(self._fd, *whole)
            self.counts.whole_stripes += 1
        else:
            self._write(self._fd, *self._place(self._rng.choice(self.own)))
            self.counts.writes += 1

    def _whole_stripes(self) -> tuple[int, int] | None:
        """Offset and length of a stripe, or of several in a row; None if no extent has one."""
        stripe = self.model.stripe
        first = bisect.bisect_left(self.own, (self._rng.randrange(self.model.size), 0))
        for extent in self.own[first:] + self.own[:first]:
            start = -(-extent.start // stripe) * stripe
            room = (extent.end - start) // stripe
            if room > 0:
                at = start + self._rng.randrange(room) * stripe
                length = min(MAX_LENGTH, (extent.end - at) // stripe * stripe)
                return at, stripe * self._rng.randint(1, length // stripe)
        return None


def address(memory: mmap.mmap) -> int:
    """Where in this process a mapping is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
