"""A base as power losses would have left it, rebuilt from its log, and what a disk shows of it.

Data are kept as versions (history.py), metadata as bytes. Pure: nothing here reads a device.
"""

from __future__ import annotations

import operator
import random
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support import ondisk
from support.direct import SECTOR
from support.history import JUNK, Codec, History
from support.ondisk import DATA_OFFSET

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from support.log_writes import Record

DATA_SECTOR = DATA_OFFSET // SECTOR
_MAGIC = b"BDEV_UBI\0"
_HEADERS = 14


class Base:
    """What is on a base: a sector of data is a version, one of metadata its bytes."""

    def __init__(self, sectors: int) -> None:
        self.data = array("i", [JUNK]) * sectors
        self.metadata: dict[int, bytes] = {}

    def copy(self) -> Base:
        copy = Base(0)
        copy.data = self.data[:]
        copy.metadata = dict(self.metadata)
        return copy

    def head(self, length: int) -> bytes:
        """The first bytes of the metadata."""
        zero = bytes(SECTOR)
        count = -(-length // SECTOR)
        return b"".join(self.metadata.get(sector, zero) for sector in range(count))

    def is_ours(self) -> bool:
        """Whether it has been made: an extension counts, and the magic is there."""
        if not self.head(SECTOR).startswith(_MAGIC):
            return False
        slots = [self.metadata.get(offset // SECTOR, bytes(SECTOR)) for offset in ondisk._SLOTS]
        return any(ondisk._parse_slot(slot) is not None for slot in slots)


@dataclass(frozen=True)
class Piece:
    """One sector of one write."""

    sector: int                        # of the base
    version: int                       # of data
    data: bytes                        # of metadata


@dataclass(frozen=True)
class State:
    """A base at some moment of its log."""

    what: str
    base: Base
    mark: int                          # the last that was put down before


class Replayer:
    """Goes through a log and gives out the states that power losses could have left."""

    def __init__(self, codec: Codec, sectors: int, seed: int) -> None:
        self._codec = codec
        self._rng = random.Random(seed)
        self._base = Base(sectors)
        self.flushes = self.torn = 0

    def states(self, records: Iterable[Record], torn: int) -> Iterator[State]:
        """At every flush; between two flushes `torn` times, at random.

        The base of a state is the replayer's own, and changes when the next one is asked for.
        """
        mark = 0
        plain: list[list[Piece]] = []
        for number, record in enumerate(records):
            if record.is_mark:
                mark = int(record.mark) if record.mark.isdecimal() else mark
                continue
            pieces = self._pieces(record)
            if record.is_flush:
                for way in range(torn if plain else 0):
                    self.torn += 1
                    yield State(f"before record {number}, torn", self._torn(plain, way), mark)
                for write in plain:
                    self._apply(self._base, write)
                plain.clear()
                self.flushes += 1
                yield State(f"flush, record {number}", self._base, mark)
            if pieces:
                plain.append(pieces)

    def _pieces(self, record: Record) -> list[Piece]:
        first, data = record.offset // SECTOR, record.data
        if record.offset >= DATA_OFFSET:
            versions = self._codec.versions(record.offset - DATA_OFFSET, data)
            return [Piece(first + at, version, b"") for at, version in enumerate(versions)]
        assert record.offset + len(data) <= DATA_OFFSET, "no write is metadata and data"
        return [Piece(first + at // SECTOR, JUNK, data[at : at + SECTOR])
                for at in range(0, len(data), SECTOR)]

    def _torn(self, plain: list[list[Piece]], way: int) -> Base:
        """Some sectors of some writes: all metadata and no data, or the other way, or any."""
        base = self._base.copy()
        for write in plain:
            is_metadata = bool(write[0].data)
            if way == 0:
                kept = write if is_metadata else []
            elif way == 1:
                kept = [] if is_metadata else write
            else:
                share = self._rng.choice([0.0, 0.5, 0.9, 1.0])
                kept = [piece for piece in write if self._rng.random() < share]
            self._apply(base, kept)
        return base

    def _apply(self, base: Base, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.data.count(0) == SECTOR:
                base.metadata.pop(piece.sector, None)
                continue
            if piece.data:
                base.metadata[piece.sector] = piece.data
            else:
                base.data[piece.sector - DATA_SECTOR] = piece.version


class Oracle:
    """What a disk may show, mark after mark."""

    def __init__(self, history: History, stripe: int, image_size: int) -> None:
        self._history = history
        self._mark = -1
        self._stripe = stripe
        self._image_stripes = -(-image_size // stripe)
        self.least = array("i", bytes(4 * len(history.sent)))
        self.most = array("i", bytes(4 * len(history.sent)))
        self._none = array("i", bytes(4 * (stripe // SECTOR)))

    def shown(self, base: Base) -> array[int]:
        """Versions of a disk's sectors, by the bits of the base's headers."""
        shown = base.data[:]
        headers = base.head(_HEADERS + 2 * self._image_stripes)[_HEADERS:]
        per_stripe = len(self._none)
        for stripe in range(self._image_stripes):
            if not headers[2 * stripe]:
                shown[stripe * per_stripe : (stripe + 1) * per_stripe] = self._none
        return shown

    def check(self, state: State, shown: array[int]) -> None:
        """What was durable by the state's mark is there, and nothing that was not yet sent."""
        while self._mark < state.mark:
            self._mark += 1
            for into, news in ((self.least, self._history.durable),
                               (self.most, self._history.possible)):
                for sector, version in news.get(self._mark, ()):
                    into[sector] = max(into[sector], version)
        if all(map(operator.le, self.least, shown)) and all(map(operator.le, shown, self.most)):
            return
        bad = [sector for sector, version in enumerate(shown)
               if not self.least[sector] <= version <= self.most[sector]]
        first = bad[0]
        raise AssertionError(
            f"{state.what}, after mark {state.mark}: {len(bad)} sectors hold what they must not; "
            f"the first is {first} (stripe {first * SECTOR // self._stripe}): version "
            f"{shown[first]}, not {self.least[first]} to {self.most[first]} ({JUNK}: never "
            "written there)",
        )
