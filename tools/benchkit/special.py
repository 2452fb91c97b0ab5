"""What is measured otherwise than by one run of fio: copies, hydration, waits, syncs, `add`."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from . import disks, servers
from .loads import (
    BANDWIDTH,
    BY_NAME,
    DELAY,
    IMAGE_BYTES,
    INSTRUCTIONS,
    KIB,
    MIB,
    RATE,
    SYNCS,
    Load,
)
from .shell import (
    FailedError,
    MissingError,
    await_copy,
    busy_ns,
    bytes_of,
    cost_ns,
    fio_report,
    run,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cases import Figure

Value = tuple[float, str]
MB = 1e6
HOT_BYTES = 8 * MIB
WINDOW_S = 0.25
# Reads until well after the window; more than enough on whatever is measured.
HOT = Load("hot", "randread", 65536, size=HOT_BYTES)
WRITERS, WRITES = 16, 32
# dm-clone's hydration_threshold and hydration_batch_size, in regions; the first are its defaults.
CLONE_SETTINGS = ((1, 1), (16, 1), (16, 16), (64, 4))
TRACING = "/sys/kernel/tracing"
SYNC = re.compile(r"^ *(?:iou-wrk-(\d+)|.+)-(\d+) +\[.* sync: ", re.MULTILINE)
FOLDER = "/mnt/bench"
ADDS = 3
SETTLED_S = 2.0                    # of idleness, which takes no time


class Say(Protocol):
    """Tells the host."""

    def __call__(self, **words: Any) -> None:
        """Print one line."""


# -- copies ---------------------------------------------------------------------------------------


def copy_by_dd() -> Value:
    """Copy the image to a base as one would without any of this."""
    words = (f"if={disks.IMAGE}", f"of={disks.RAW}", "bs=1M", "iflag=direct", "oflag=direct")
    count = f"count={IMAGE_BYTES // MIB}"
    run("dd", *words, "count=1")
    return _rate(lambda: run("dd", *words, count)), BANDWIDTH


def _rate(work: Callable[[], object]) -> float:
    """Tell at which rate all of the image is copied, MB of it per 10^9 instructions."""
    return IMAGE_BYTES * 1e3 / cost_ns(work)


class _Copier(NamedTuple):
    """A disk that can copy its image in the background."""

    node: str
    start: Callable[[], object]
    copied: Callable[[], int]      # bytes


Copying = Callable[[], AbstractContextManager[_Copier]]


@contextlib.contextmanager
def ours_copying(*options: str) -> Iterator[_Copier]:
    """Have a disk of ours, nothing hydrated."""
    with servers.our_disk(*options, hydrated=False) as node:
        start = partial(servers.ask_daemon, "hydrate", run=True)
        yield _Copier(node, start, partial(bytes_of, servers.ask_daemon("status")["pid"], "write"))


@contextlib.contextmanager
def clone_copying(region: int, threshold: int = 1, batch: int = 1) -> Iterator[_Copier]:
    """Have a clone, nothing hydrated."""
    settings = ("4", "hydration_threshold", str(threshold), "hydration_batch_size", str(batch))
    with servers.dm_clone(region, *settings) as node:
        enable = partial(run, "dmsetup", "message", "clone", "0", "enable_hydration")
        yield _Copier(node, enable, lambda: servers.clone_hydrated() * region)


def hydration(copying: Copying) -> Value:
    """Copy all of an image in the background."""
    with copying() as disk:
        def work() -> None:
            copied = disk.copied()
            disk.start()
            await_copy(disk.copied, copied, IMAGE_BYTES)

        return _rate(work), BANDWIDTH


def clone_hydration(region: int) -> Value:
    """Do so with dm-clone's best setting."""
    tried = [hydration(partial(clone_copying, region, *setting)) for setting in CLONE_SETTINGS]
    return max(tried)


def cold_read() -> Value:
    """Read all of a cold disk, and wait until all has been copied, too.

    fio's own end is not that: here the processor's time counts, less that of fio's start. The
    better of two: at first some of the programs' code is not in memory.
    """
    load = BY_NAME["cold-read-1m"]
    start_fio = partial(run, "fio", *load.words(disks.RAW, 1))
    start_fio()  # the first one reads it from disk
    start = cost_ns(start_fio)

    def once() -> int:
        with ours_copying() as disk:
            def work() -> None:
                copied = disk.copied()
                run("fio", *load.words(disk.node, load.count))
                until(lambda: disk.copied() - copied >= IMAGE_BYTES, "the copy of what was read")

            return cost_ns(work)

    return IMAGE_BYTES * 1e3 / (min(once(), once()) - start), BANDWIDTH


def _busy(work: Callable[[], object]) -> int:
    before = busy_ns()
    work()
    return busy_ns() - before


# -- hot reads meanwhile --------------------------------------------------------------------------


class _Meanwhile(NamedTuple):
    reads: float                   # a second
    copied: float                  # bytes a second
    longest: float                 # ms


def reads_meanwhile(copying: Copying) -> _Meanwhile:
    """Read what has been written while the rest is copied."""
    with copying() as disk:
        run("dd", "if=/dev/zero", f"of={disk.node}", "bs=1M", "oflag=direct", "conv=fsync",
            f"count={HOT_BYTES // MIB}")  # fmt: skip
        words = HOT.words(disk.node, HOT.count)
        with subprocess.Popen(["fio", *words], stdout=subprocess.PIPE, text=True) as fio:
            try:
                until(lambda: bytes_of(fio.pid, "read") > MIB, "fio's first reads")
                disk.start()
                read, copied = _window(fio.pid, disk)
                if fio.poll() is not None:
                    raise FailedError("fio ended before the window did")
                longest = fio_report(fio.communicate()[0])["read"]["lat_ns"]["max"]
            finally:
                fio.kill()
    if copied * WINDOW_S >= IMAGE_BYTES - HOT_BYTES:
        raise FailedError("all was copied before the window ended")
    return _Meanwhile(read / HOT.block, copied, longest / 1e6)


def _window(fio: int, disk: _Copier) -> tuple[float, float]:
    """Return what is read and copied for a while, bytes a second."""
    before = time.monotonic_ns(), bytes_of(fio, "read"), disk.copied()
    time.sleep(WINDOW_S)
    after = time.monotonic_ns(), bytes_of(fio, "read"), disk.copied()
    ns, read, copied = (late - early for early, late in zip(before, after, strict=True))
    return read * 1e9 / ns, copied * 1e9 / ns


@functools.cache
def ours_meanwhile() -> _Meanwhile:
    """Measure once what three figures are taken from."""
    return reads_meanwhile(ours_copying)


# -- syncs ----------------------------------------------------------------------------------------


def syncs_of_writers() -> Value:
    """Count the base's fdatasyncs while many writers sync each write to a cold disk."""
    options = ("--fsync=1", f"--numjobs={WRITERS}", "--group_reporting")
    load = Load("writers", "randwrite", WRITES, depth=1, more=options)
    with servers.SUBJECTS["ubi-cold-64k"]() as node, noted_syncs() as noted:
        daemon = servers.ask_daemon("status")["pid"]
        own = {int(name) for name in os.listdir(f"/proc/{daemon}/task")}
        run("fio", *load.words(node, WRITES))
        syncs = noted()
    bases = sum(task in own for task in syncs)
    guests = len(syncs) - bases
    if guests < WRITERS * (WRITES - 1):  # fio makes none after the last write
        raise FailedError(f"{guests} fsyncs were seen, with {WRITERS * WRITES} writes")
    return bases * 1000 / guests, SYNCS


@contextlib.contextmanager
def noted_syncs() -> Iterator[Callable[[], list[int]]]:
    """Have the kernel note which tasks sync block devices, also by a worker of their ring's."""
    if not os.path.exists(f"{TRACING}/kprobe_events"):
        run("mount", "-t", "tracefs", "tracefs", TRACING)
    _write(f"{TRACING}/kprobe_events", "p:bench/sync blkdev_fsync")
    enabled = f"{TRACING}/events/bench/sync/enable"
    _write(enabled, "1")

    def tasks() -> list[int]:
        _write(enabled, "0")
        with open(f"{TRACING}/trace") as file:
            found = SYNC.findall(file.read())
        return [int(owner or task) for owner, task in found]

    try:
        yield tasks
    finally:
        _write(enabled, "0")
        open(f"{TRACING}/kprobe_events", "w").close()  # which takes all probes away


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text + "\n")


# -- add ------------------------------------------------------------------------------------------


@functools.cache
def filesystem() -> str:
    """Make a filesystem for sparse files."""
    run("mkfs.ext4", "-q", "-b", "4096", disks.FILES)
    os.makedirs(FOLDER)
    run("mount", disks.FILES, FOLDER)
    return FOLDER


@contextlib.contextmanager
def added(folder: str, name: str, size: int) -> Iterator[int]:
    """Make a disk of a new image of `size`; tell how many instructions that took."""
    image, base = f"{folder}/{name}.image", f"{folder}/{name}.base"
    with open(image, "wb") as file:
        file.truncate(size)
    words = ("add", "--image", image, "--base", base, "--name", name)
    yield _busy(lambda: run(servers.UBI, *words))
    servers.ubi("del", name)
    os.unlink(image)
    os.unlink(base)


def add(size: int) -> Value:
    """Count what `ublk-ubi add` takes, until the disk is live: the least of some.

    There is a disk already: all programs are in memory, and the watch, which the first `add` starts
    once its disk is live, runs.
    """
    folder, taken = filesystem(), []
    with added(folder, "first", 64 * MIB):
        for _ in range(ADDS):
            time.sleep(SETTLED_S)
            with added(folder, "second", size) as instructions:
                taken.append(instructions)
    return min(taken) / 1e9, INSTRUCTIONS


# -- all of them ----------------------------------------------------------------------------------

SPECIAL: dict[tuple[str, str], Callable[[], Value]] = {
    ("dd", "copy"): copy_by_dd,
    ("ubi-cold-1m", "cold-read-copied"): cold_read,
    ("ubi-cold-1m", "hydration"): partial(hydration, ours_copying),
    ("ubi-cold-64k", "hydration"):
        partial(hydration, partial(ours_copying, "--stripe-size", "64K")),
    ("dm-clone-cold-1m", "hydration"): partial(clone_hydration, MIB),
    ("dm-clone-cold-64k", "hydration"): partial(clone_hydration, 64 * KIB),
    ("ubi-hydrating", "reads"): lambda: (ours_meanwhile().reads, RATE),
    ("ubi-hydrating", "longest"): lambda: (ours_meanwhile().longest, DELAY),
    ("ubi-hydrating", "hydration"): lambda: (ours_meanwhile().copied / MB, BANDWIDTH),
    ("dm-clone-hydrating", "reads"):
        lambda: (reads_meanwhile(partial(clone_copying, MIB)).reads, RATE),
    ("ubi-cold-64k", "fsyncs-16"): syncs_of_writers,
    ("ubi-add", "add-1g"): partial(add, 1 << 30),
    ("ubi-add", "add-1t"): partial(add, 1 << 40),
}  # fmt: skip


def measure(figure: Figure, say: Say) -> None:
    """Measure one figure and tell it."""
    try:
        value, unit = SPECIAL[figure]()
        say(figure=figure.name, value=value, unit=unit)
    except MissingError as error:
        say(figure=figure.name, missing=str(error))
    except (FailedError, OSError) as error:
        say(figure=figure.name, failed=str(error))
