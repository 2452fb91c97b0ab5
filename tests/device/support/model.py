"""Random operations on a disk from many threads at once, against a model of it in memory.

What overlapping requests in flight leave is anybody's guess, so no two threads are let near the
same sectors: each round *deals* extents of the disk. An extent belongs to one thread, which writes
and reads it, or to all, which read it. Extents are cut with no regard for stripes, most of them
small and close together: several threads are in the same stripe, on neighbouring sectors, nearly
all the time. A round keeps to a window of the disk that moves on, so that there are cold stripes to
the end.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import mmap
import os
import random
import threading
from dataclasses import dataclass
from typing import NamedTuple

from support.direct import SECTOR, assert_content, assert_same

MAX_LENGTH = 1 << 20
POOL_SIZE = 2 << 20                # random bytes that writes take their data from

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


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
    flushes: int = 0

    @property
    def total(self) -> int:
        return self.reads + self.writes + self.durable_writes + self.whole_stripes + self.flushes

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
        assert_content(self.path, self.content, what)

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
            if lot < 0.40 or not self.own:
                self._read()
            elif lot < 0.76:
                self._write(self._fd, *self._place(self._rng.choice(self.own)))
                self.counts.writes += 1
            elif lot < 0.88:
                self._write(self._durable_fd, *self._place(self._rng.choice(self.own)))
                self.counts.durable_writes += 1
            elif lot < 0.97:
                self._write_whole_stripe()
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
        if _memcmp(address(self._buffer), address(self.model.content) + offset, length) != 0:
            expected = self.model.content[offset : offset + length]
            assert_same(self._buffer[:length], expected, offset, what)
        self.counts.reads += 1

    def _write(self, fd: int, offset: int, length: int) -> None:
        start = self._rng.randrange((POOL_SIZE - length) // SECTOR + 1) * SECTOR
        count = os.pwritev(fd, [self._pool[start : start + length]], offset)
        assert count == length, f"{self.where}: wrote {count} of {length} bytes at {offset}"
        self._content[offset : offset + length] = self._pool[start : start + length]

    def _write_whole_stripe(self) -> None:
        """One stripe, or several in a row, exactly; whatever else if no extent has one."""
        stripe = self.model.stripe
        first = bisect.bisect_left(self.own, (self._rng.randrange(self.model.size), 0))
        for extent in self.own[first:] + self.own[:first]:
            start = -(-extent.start // stripe) * stripe
            room = (extent.end - start) // stripe
            if room > 0:
                at = start + self._rng.randrange(room) * stripe
                length = min(MAX_LENGTH, (extent.end - at) // stripe * stripe)
                length = stripe * self._rng.randint(1, length // stripe)
                self._write(self._fd, at, length)
                self.counts.whole_stripes += 1
                return
        self._write(self._fd, *self._place(self._rng.choice(self.own)))
        self.counts.writes += 1


def address(memory: mmap.mmap) -> int:
    """Where in this process a mapping is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
