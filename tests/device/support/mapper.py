"""Device-mapper disks whose behaviour a test can change while they are in use."""

from __future__ import annotations

import itertools
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from support.direct import SECTOR, block_size
from support.shell import run

if TYPE_CHECKING:
    from support.undo import Undo

_numbers = itertools.count()


class Mapped:
    """A mapped disk over the whole of another one; `path` is its node.

    Each of the calls below replaces what it does, for all I/O that comes from then on; I/O that a
    delay holds is let go at once.
    """

    def __init__(self, below: str, name: str) -> None:
        self.below = below
        self.name = name
        self.path = f"/dev/mapper/{name}"
        self.size = block_size(below)
        self.sectors = self.size // SECTOR
        self.faulty = False

    def linear(self) -> None:
        """Pass everything through."""
        self.table(f"0 {self.sectors} linear {self.below} 0")
        self.faulty = False

    def delay(self, *, read_ms: int = 0, write_ms: int = 0, flush_ms: int | None = None) -> None:
        """Hold reads, writes and flushes (as long as writes, unless told) for a while each."""
        flush_ms = write_ms if flush_ms is None else flush_ms
        ways = " ".join(f"{self.below} 0 {ms}" for ms in (read_ms, write_ms, flush_ms))
        self.table(f"0 {self.sectors} delay {ways}")

    def error(self, offset: int = 0, length: int | None = None) -> None:
        """Fail reads and writes of a range of bytes, or of the whole disk."""
        start = offset // SECTOR
        count = self.sectors - start if length is None else length // SECTOR
        end = start + count
        rows = [f"0 {start} linear {self.below} 0"] if start else []
        rows.append(f"{start} {count} error")
        if end < self.sectors:
            rows.append(f"{end} {self.sectors - end} linear {self.below} {end}")
        self.table("\n".join(rows))

    def flakey(self, *features: str) -> None:
        """Misbehave all the time, as the features of dm-flakey say ("error_writes", …)."""
        words = " ".join([str(sum(len(f.split()) for f in features)), *features])
        self.table(f"0 {self.sectors} flakey {self.below} 0 0 3600 {words}")

    def table(self, table: str) -> None:
        """Load any table and switch to it: what is in flight ends first, under the old one."""
        self.faulty = True
        run("dmsetup", "load", self.name, stdin=table)
        # --noflush: I/O that cannot end must not hold up the switch.
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)
        run("dmsetup", "resume", self.name)

    def message(self, *words: object) -> str:
        """Send a message to the target."""
        return run("dmsetup", "message", self.name, 0, *words)

    def suspend(self) -> None:
        """Queue all I/O until `resume`: a disk that does not answer."""
        self.faulty = True
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)

    def resume(self) -> None:
        run("dmsetup", "resume", self.name)

    def heal(self) -> None:
        """Be a sound disk again, whatever it was made to be."""
        if self.faulty and os.path.exists(self.path):
            self.linear()


class Mapper:
    """Makes mapped disks with this run's prefix, and takes them away with the test."""

    def __init__(self, undo: Undo, prefix: str) -> None:
        self._undo = undo
        self._prefix = prefix

    def map(self, below: str) -> Mapped:
        """A disk over the block device `below` that passes everything through, so far."""
        if not os.path.exists("/dev/mapper/control") or shutil.which("dmsetup") is None:
            pytest.skip("needs device-mapper and dmsetup")
        mapped = Mapped(below, f"{self._prefix}-{next(_numbers)}")
        run("dmsetup", "create", mapped.name, stdin=f"0 {mapped.sectors} linear {below} 0")
        self._undo.callback(run, "dmsetup", "remove", "--retry", mapped.name)
        self._undo.healers.append(mapped.heal)
        self._undo.callback(mapped.heal)
        return mapped


def delayed_reads(disk: Mapped) -> int:
    """Reads that dm-delay holds; its status is what it holds of reads, writes and flushes."""
    return int(run("dmsetup", "status", disk.name).split()[-3])


def delayed_writes(disk: Mapped) -> int:
    """Writes that it holds."""
    return int(run("dmsetup", "status", disk.name).split()[-2])
