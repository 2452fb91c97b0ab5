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
from .loads import BANDWIDTH, DELAY, IMAGE_BYTES, INSTRUCTIONS, KIB, MIB, RATE, SYNCS, Load
from .shell import (
    FailedError,
    MissingError,
    busy_ns,
    bytes_of,
    fio_report,
    run,
    seconds,
    time_of_copy,
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
HOT = Load("hot", "randread", 98304, size=HOT_BYTES)
WRITERS, WRITES = 16, 32
# dm-clone's hydration_threshold and hydration_batch_size, in regions; the first are its defaults.
CLONE_SETTINGS = ((1, 1), (16, 1), (16, 16), (64, 4))
TRACING = "/sys/kernel/tracing"
FOLDER = "/mnt/bench"


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
    return IMAGE_BYTES / MB / seconds(lambda: run("dd", *words, count)), BANDWIDTH


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
        daemon = servers.ubi("status", "bench")["pid"]
        yield _Copier(node, servers.start_hydration, partial(bytes_of, daemon, "write"))


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
        return IMAGE_BYTES / MB / time_of_copy(disk.start, disk.copied, IMAGE_BYTES), BANDWIDTH


def clone_hydration(region: int) -> Value:
    """Do so with dm-clone's best setting."""
    tried = [hydration(partial(clone_copying, region, *setting)) for setting in CLONE_SETTINGS]
    return max(tried)


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
                before = time.monotonic_ns(), bytes_of(fio.pid, "read"), disk.copied()
                time.sleep(WINDOW_S)
                after = time.monotonic_ns(), bytes_of(fio.pid, "read"), disk.copied()
                if fio.poll() is not None:
                    raise FailedError("fio ended before the window did")
                report = fio_report(fio.communicate()[0])["read"]
            finally:
                fio.kill()
    ns, read, copied = (late - early for early, late in zip(before, after, strict=True))
    if copied >= IMAGE_BYTES - HOT_BYTES:
        raise FailedError("all was copied before the window ended")
    return _Meanwhile(read / HOT.block * 1e9 / ns, copied * 1e9 / ns,
                      report["lat_ns"]["max"] / 1e6)  # fmt: skip


@functools.cache
def ours_meanwhile() -> _Meanwhile:
    """Measure once what three figures are taken from."""
    return reads_meanwhile(ours_copying)


# -- syncs ----------------------------------------------------------------------------------------


def syncs_of_writers() -> Value:
    """Count the base's fdatasyncs while many writers sync each write to a cold disk."""
    options = ("--fsync=1", f"--numjobs={WRITERS}", "--group_reporting")
    load = Load("writers", "randwrite", WRITES, depth=1, more=options)
    with servers.SUBJECTS["ubi-cold-64k"]() as node, counted_syncs() as counted:
        run("fio", *load.words(node, WRITES))
        guests, bases = counted()
    if guests < WRITERS * WRITES:
        raise FailedError(f"{guests} fsyncs were seen of {WRITERS * WRITES}")
    return bases * 1000 / guests, SYNCS


@contextlib.contextmanager
def counted_syncs() -> Iterator[Callable[[], tuple[int, int]]]:
    """Have the kernel count syncs of block devices: fio's own, and everybody else's."""
    if not os.path.exists(f"{TRACING}/kprobe_events"):
        run("mount", "-t", "tracefs", "tracefs", TRACING)
    event = f"{TRACING}/events/bench/sync"
    _write(f"{TRACING}/kprobe_events", "p:bench/sync blkdev_fsync")
    _write(f"{event}/trigger", "hist:keys=common_pid.execname")

    def count() -> tuple[int, int]:
        with open(f"{event}/hist") as file:
            found = re.findall(r"common_pid: (\S+).*hitcount: +(\d+)", file.read())
        fios = sum(int(hits) for name, hits in found if name == "fio")
        return fios, sum(int(hits) for _, hits in found) - fios

    try:
        yield count
    finally:
        _write(f"{event}/trigger", "!hist:keys=common_pid.execname")
        _write(f"{TRACING}/kprobe_events", "-:bench/sync")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text + "\n")


# -- add ------------------------------------------------------------------------------------------


@functools.cache
def filesystem() -> str:
    """Make a filesystem for sparse files; have `add` in memory, as where it was used before."""
    run("mkfs.ext4", "-q", "-b", "4096", disks.FILES)
    os.makedirs(FOLDER)
    run("mount", disks.FILES, FOLDER)
    added(FOLDER, "first", 64 * MIB)
    return FOLDER


def added(folder: str, name: str, size: int) -> int:
    """Tell how many instructions it takes to make a disk of a new image of `size`."""
    image, base = f"{folder}/{name}.image", f"{folder}/{name}.base"
    with open(image, "wb") as file:
        file.truncate(size)
    before = busy_ns()
    run(servers.UBI, "add", "--image", image, "--base", base, "--name", "bench")
    taken = busy_ns() - before
    servers.ubi("del", "bench")
    os.unlink(image)
    os.unlink(base)
    return taken


def add(size: int) -> Value:
    """Count what `ublk-ubi add` takes."""
    return added(filesystem(), str(size), size) / 1e9, INSTRUCTIONS


# -- all of them ----------------------------------------------------------------------------------

SPECIAL: dict[tuple[str, str], Callable[[], Value]] = {
    ("dd", "copy"): copy_by_dd,
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
