"""Power losses at every point of a real kernel's history of a base, replayed from dm-log-writes.

Guests load a disk whose base is logged, through a clean stop and a killed daemon. Marks in the
log say what they had got acknowledged when. Then power losses that the log allows are rebuilt, read
by the format's description, and compared with what the guests were promised; some are added for
real. (A flush follows each O_DSYNC write: what FUA alone is worth is the matter of test_fua.py.)
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import threading
import time
import uuid
from typing import TYPE_CHECKING

import pytest
from support.direct import SECTOR, DirectFile
from support.history import Codec, History, content
from support.log_writes import LoggedDisk, read_log
from support.ondisk import DATA_OFFSET
from support.replay import Base, Oracle, Replayer
from support.shell import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.stores import Stores

MIB = 1 << 20
STRIPE = 64 << 10
PER_STRIPE = STRIPE // SECTOR
IMAGE_SIZE = 20 * MIB - 12_345     # headers in two sectors of the first page; ends inside a sector
SIZE = 21 * MIB
# Where the load goes: both sides of the border between the two sectors of headers, and the end.
WINDOW = [*range(24), *range(236, 262), *range(314, 336)]
THREADS = 4
PHASES = 3
OPERATIONS = int(os.environ.get("UBLK_UBI_LOG_OPERATIONS", "100"))     # a thread and phase
TORN = 4                           # states between two flushes
REAL = 3                           # states that are added for real
JUNK_BYTE = b"\xa5"                # what was on the base before
BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Guest:
    """One thread's requests, to sectors that are its own."""

    def __init__(
        self, number: int, device: Device, history: History, codec: Codec, seed: int,
    ) -> None:
        self.number = number
        self.history = history
        self.codec = codec
        self.rng = random.Random(seed)
        self.counts = dict.fromkeys(("reads", "writes", "durable writes", "flushes"), 0)
        flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
        self.fd = os.open(device.node, flags)
        self.durable_fd = os.open(device.node, flags | os.O_DSYNC)
        self.buffer = mmap.mmap(-1, STRIPE)
        self.view = memoryview(self.buffer)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.durable_fd)

    def work(self, operations: int, stripes: list[int]) -> None:
        for _ in range(operations):
            lot = self.rng.random()
            if lot < 0.3:
                self.read(*self.place(stripes))
            elif lot < 0.75:
                self.write(*self.place(stripes), durable=False)
            elif lot < 0.9:
                self.write(*self.place(stripes), durable=True)
            else:
                self.flush()

    def place(self, stripes: list[int]) -> tuple[int, int]:
        """A run of sectors of its own; every third stripe is one thread's as a whole."""
        while True:
            stripe = self.rng.choice(stripes)
            start = stripe * PER_STRIPE
            if stripe % 3 == 0:
                if stripe // 3 % THREADS == self.number and self.rng.random() < 0.6:
                    return start, PER_STRIPE
                continue
            slices = [at for at in range(PER_STRIPE // 8) if (at + stripe) % THREADS == self.number]
            first = self.rng.randrange(8)
            return start + self.rng.choice(slices) * 8 + first, self.rng.randint(1, 8 - first)

    def read(self, first: int, count: int) -> None:
        least = self.history.done[first : first + count]
        got = os.preadv(self.fd, [self.view[: count * SECTOR]], first * SECTOR)
        if got == 0:
            raise OSError(errno.ENODEV, "the disk has no size any more")
        assert got == count * SECTOR
        found = self.codec.versions(first * SECTOR, self.buffer[:got])
        most = self.history.sent[first : first + count]
        for at, version in enumerate(found):
            assert least[at] <= version <= most[at], (
                f"sector {first + at}: version {version}, not {least[at]} to {most[at]}")
        self.counts["reads"] += 1

    def write(self, first: int, count: int, *, durable: bool) -> None:
        versions = self.history.send(first, count)
        data = b"".join(content(first + at, version) for at, version in enumerate(versions))
        self.buffer[: len(data)] = data
        fd = self.durable_fd if durable else self.fd
        assert os.pwritev(fd, [self.view[: len(data)]], first * SECTOR) == len(data)
        self.history.complete(first, versions, durable=durable)
        self.counts["durable writes" if durable else "writes"] += 1

    def flush(self) -> None:
        begun = self.history.flush_begins()
        os.fsync(self.fd)
        self.history.flush_ends(begun)
        self.counts["flushes"] += 1


class Load:
    """All guests of a disk."""

    def __init__(self, device: Device, history: History, codec: Codec, seed: int) -> None:
        self.device = device
        self.history = history
        self.codec = codec
        self.rng = random.Random(seed)
        self.cold = self.rng.sample(WINDOW, len(WINDOW))
        self.counts = dict.fromkeys(("stripes", "whole_stripe_writes", "rounds", "joined"), 0)

    def phase(self, *, kill: bool = False) -> None:
        """Some load on stripes cold and hot; `kill` takes the daemon away in the middle of it."""
        cold = [self.cold.pop() for _ in range(len(WINDOW) // PHASES)]
        stripes = [*cold, *cold[:8] * 4, *self.rng.sample(WINDOW, 6)]
        failures: list[BaseException] = []
        guests = [Guest(number, self.device, self.history, self.codec, self.rng.getrandbits(32))
                  for number in range(THREADS)]

        def work(guest: Guest) -> None:
            try:
                guest.work(OPERATIONS, stripes)
            except OSError as error:
                if not kill:
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

        tasks = [threading.Thread(target=work, args=(guest,)) for guest in guests]
        for task in tasks:
            task.start()
        if kill:
            time.sleep(0.5)
            self.count()
            self.device.kill()
        for task in tasks:
            task.join()
        if not kill:
            self.count()
        for guest in guests:
            guest.close()
            for name, count in guest.counts.items():
                self.counts[name] = self.counts.get(name, 0) + count
        if failures:
            raise failures[0]

    def count(self) -> None:
        """Add up what this daemon has done."""
        status = self.device.status()
        for name, count in {**status["hydration"], **status["commit"]}.items():
            if name in self.counts:
                self.counts[name] += count


@contextlib.contextmanager
def another_boot(folder: Path) -> Iterator[None]:
    """Let what is opened meanwhile have been opened before this boot."""
    file = folder / "boot_id"
    file.write_text(f"{uuid.uuid4()}\n")
    run("mount", "--bind", file, BOOT_ID)
    try:
        yield
    finally:
        run("umount", BOOT_ID)


def fill(path: str, size: int) -> None:
    """An old disk's data behind 8 MiB of zeros."""
    with DirectFile(path) as file:
        for offset in range(DATA_OFFSET, size, MIB):
            file.pwrite(JUNK_BYTE * MIB, offset)


def write_base(path: str, base: Base, codec: Codec) -> None:
    """Make a disk what a base was."""
    with DirectFile(path) as file:
        metadata = bytearray(DATA_OFFSET)
        for sector, data in base.metadata.items():
            metadata[sector * SECTOR : (sector + 1) * SECTOR] = data
        file.pwrite(bytes(metadata), 0)
        for first in range(0, len(base.data), MIB // SECTOR):
            versions = base.data[first : first + MIB // SECTOR]
            data = codec.bytes_of(first, versions, JUNK_BYTE * SECTOR)
            file.pwrite(data, DATA_OFFSET + first * SECTOR)


@pytest.mark.limit(240)
@pytest.mark.cpus(2)
def test_every_power_loss_keeps_what_was_promised(
    ubi: Ubi, mapper: Mapper, stores: Stores, make_image: Callable[..., Image], seed: int,
    tmp_path: Path,
) -> None:
    started = time.monotonic()
    image = make_image(IMAGE_SIZE, on="tmpfs", holes=0.2)
    below = stores.block("ram", DATA_OFFSET + SIZE)
    fill(below, DATA_OFFSET + SIZE)
    logged = LoggedDisk(mapper.map(below), stores.block("ram", 256 * MIB), stores)
    history, codec = History(SIZE // SECTOR, logged.mark), Codec(image.as_disk(SIZE))
    with another_boot(tmp_path):
        device = ubi.add(image, logged.path, stripe_size=STRIPE, zero=True, queues=2)
        logged.mark()
        load = Load(device, history, codec, seed)
        load.phase()
        device.reopen(data_path="copy")
        load.phase(kill=True)
        device.start(data_path="zero-copy")
        load.phase()
        device.stop()
    logged.stop()
    print(f"{load.counts}, {logged.marks} marks; load {time.monotonic() - started:.1f} s")

    replayer = Replayer(codec, SIZE // SECTOR, seed)
    oracle = Oracle(history, STRIPE, IMAGE_SIZE)
    real = Real(ubi, stores, image, codec, oracle, random.Random(seed))
    unmade = 0
    for state in replayer.states(read_log(logged.log), TORN):
        if not state.base.is_ours():
            assert state.mark == 0, f"{state.what}: a base that was live is none any more"
            unmade += 1
            continue
        oracle.check(state, oracle.shown(state.base))
        real.consider(state.base, state.what)
    print(f"checked: {replayer.flushes} flushes, {replayer.torn} torn; {unmade} of "
          f"them before the base was made; {time.monotonic() - started:.1f} s")
    assert min(replayer.flushes, replayer.torn) > 0
    real.add_them()
    image.assert_untouched()
    print(f"{len(real.chosen)} added for real; {time.monotonic() - started:.1f} s")


class Real:
    """A few of the states, for the product itself."""

    def __init__(
        self, ubi: Ubi, stores: Stores, image: Image, codec: Codec, oracle: Oracle,
        rng: random.Random,
    ) -> None:
        self.ubi = ubi
        self.stores = stores
        self.image = image
        self.codec = codec
        self.oracle = oracle
        self.rng = rng
        self.seen = 0
        self.chosen: list[tuple[str, Base]] = []

    def consider(self, base: Base, what: str) -> None:
        """Keep so many of all, each as likely as the others."""
        self.seen += 1
        place = len(self.chosen) if len(self.chosen) < REAL else self.rng.randrange(self.seen)
        if place < REAL:
            self.chosen[place : place + 1] = [(what, base.copy())]

    def add_them(self) -> None:
        """Each into a fresh base; the disk shows just what its headers say."""
        fresh = self.stores.block("ram", DATA_OFFSET + SIZE)
        for what, base in self.chosen:
            write_base(fresh, base, self.codec)
            device = self.ubi.add(self.image, fresh)
            expected = self.codec.bytes_of(0, self.oracle.shown(base), JUNK_BYTE * SECTOR)
            with device.open(os.O_RDONLY) as disk:
                for offset in range(0, SIZE, MIB):
                    found = disk.pread(offset, MIB)
                    assert found == expected[offset : offset + MIB], f"{what}: the MiB at {offset}"
            device.stop()
