"""What the lifecycle engine is run on: a base whose cache power loss empties, a host's tables."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from enginekit import ubiformat
from ublk_ubi import _testing as t

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MIB = 1 << 20
PAGE = 4096
SECTOR = 512
_ZEROS = bytes(PAGE)
HOST_NAMES = {
    value: name.removeprefix("HOST_").lower()
    for name, value in vars(t).items() if name.startswith("HOST_")
}


class Write(NamedTuple):
    """A write that no fdatasync has covered yet."""

    offset: int
    data: bytes


class Disk:
    """The metadata of a base, by pages; a page that is not there is zero."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.durable: dict[int, bytes] = {}
        self.unsynced: list[Write] = []

    def read(self, offset: int, length: int) -> bytes:
        assert offset % PAGE == length % PAGE == 0
        assert offset + length <= ubiformat.DATA_OFFSET
        pages = range(offset // PAGE, (offset + length) // PAGE)
        return b"".join(self.pages.get(page, _ZEROS) for page in pages)

    def write(self, offset: int, data: bytes) -> None:
        self.unsynced.append(Write(offset, data))
        _apply(self.pages, Write(offset, data))

    def sync(self) -> None:
        self.durable = dict(self.pages)
        self.unsynced = []

    def put(self, offset: int, data: bytes) -> None:
        """Change what is there, durably, behind everybody's back."""
        first = offset // PAGE
        count = -(-(offset + len(data)) // PAGE) - first
        around = bytearray(self.read(first * PAGE, count * PAGE))
        around[offset - first * PAGE : offset - first * PAGE + len(data)] = data
        self.write(first * PAGE, bytes(around))
        self.sync()

    def copy(self) -> Disk:
        other = Disk()
        other.pages, other.durable = dict(self.pages), dict(self.durable)
        other.unsynced = list(self.unsynced)
        return other

    def after_power_loss(self, kept: Iterable[Write] = ()) -> Disk:
        """What is left of it: all that was synced, and of the rest the writes `kept`."""
        other = Disk()
        other.pages = dict(self.durable)
        for write in kept:
            _apply(other.pages, write)
        other.sync()
        return other

    # -- what is on it --

    def head(self) -> ubiformat.Head:
        return ubiformat.parse_head(self.read(0, PAGE))

    def slot(self, index: int) -> ubiformat.Slot:
        return ubiformat.parse_slot(self.read(ubiformat.SLOT_OFFSETS[index], PAGE)[:SECTOR])

    def current(self) -> ubiformat.Slot:
        """Give the slot that counts."""
        slots = [slot for slot in (self.slot(0), self.slot(1))
                 if slot.crc_fits and slot.magic == ubiformat.SLOT_MAGIC]
        return max(slots, key=lambda slot: slot.sequence)

    def set_header(self, stripe: int, value: bytes = b"\1\0") -> None:
        self.put(ubiformat.HEADERS_OFFSET + 2 * stripe, value)

    def header(self, stripe: int) -> bytes:
        page, offset = ubiformat.header_place(stripe)
        return self.read(page * PAGE, PAGE)[offset : offset + 2]


def _apply(pages: dict[int, bytes], write: Write) -> None:
    """Write whole sectors into pages."""
    assert write.offset % SECTOR == len(write.data) % SECTOR == 0
    at = 0
    while at < len(write.data):
        page, start = divmod(write.offset + at, PAGE)
        piece = write.data[at : at + PAGE - start]
        if len(piece) < PAGE:
            old = pages.get(page, _ZEROS)
            whole = old[:start] + piece + old[start + len(piece) :]
        else:
            whole = piece
        if whole == _ZEROS:
            pages.pop(page, None)
        else:
            pages[page] = whole
        at += len(piece)


def torn(write: Write) -> list[list[Write]]:
    """Give what power loss may leave of a write: its first sector, or all but that."""
    first = Write(write.offset, write.data[:SECTOR])
    others = Write(write.offset + SECTOR, write.data[SECTOR:])
    return [[first], [others]]


@dataclass
class FoundTable:
    """A table file: whose it is, its rows, and whether a daemon holds it."""

    identity: dict
    rows: bytearray
    live: bool = False
    damaged: bool = False

    @property
    def state(self) -> int:
        if self.live:
            return t.TABLE_LIVE
        return t.TABLE_DAMAGED if self.damaged else t.TABLE_FOUND


@dataclass
class Tables:
    """The folder of tables, by UUID."""

    published: dict[bytes, FoundTable] = field(default_factory=dict)
    temporary: dict[bytes, FoundTable] = field(default_factory=dict)

    def copy(self) -> Tables:
        return copy.deepcopy(self)


class Opening:
    """One daemon's lifecycle engine on a disk; `trace` says what it did, in words."""

    def __init__(self, disk: Disk, tables: Tables, **options: object) -> None:
        defaults = {"base_bytes": 12 * MIB, "image_bytes": 3 * MIB + 512}
        self.steps = t.LifecycleSteps(**(defaults | options))
        self.disk = disk
        self.tables = tables
        self.trace: list[str] = []
        self.rows: bytearray | None = None

    def run(self, kind: int, *, fail_at: int | None = None, error: int = 0, offset: int = 0,
            stop_at: int | None = None, before: Callable[[], None] | None = None) -> list[str]:
        """Do what the engine asks for until it asks for nothing; return what this was.

        The action number `fail_at` fails with -`error`; the process dies before number `stop_at`.
        """
        first = len(self.trace)
        action = self.steps.step(kind, offset=offset)
        while action is not None and len(self.trace) - first != stop_at:
            if before is not None:
                before()
            self.trace.append(self._describe(action))
            failing = len(self.trace) - first - 1 == fail_at
            result = -error if failing else self._do(action)
            action = self.steps.step(t.EVENT_DONE, result)
        return self.trace[first:]

    @property
    def uuid(self) -> bytes:
        offset, length = ubiformat.FIELDS["uuid"]
        return self.steps.slot[offset : offset + length]

    def commit(self, *stripes: int) -> None:
        """Do what a hydrator does: row, shadow page and header."""
        for stripe in stripes:
            self.rows[stripe] = 1
            self.steps.pages[ubiformat.HEADERS_OFFSET + 2 * stripe] = 1
            self.disk.set_header(stripe)

    def _memory(self, action: t.Act) -> tuple[bytearray, int]:
        if action.memory == t.MEM_PAGE:
            return self.steps.pages, action.index * PAGE
        assert action.memory == t.MEM_SCRATCH
        return self.steps.scratch, action.index

    def _do(self, action: t.Act) -> int:
        if action.kind == t.ACT_SYNC_BASE:
            self.disk.sync()
            return 0
        if action.kind == t.ACT_HOST:
            getattr(self, f"_{HOST_NAMES[action.message]}", lambda: None)()
            return 0
        assert action.minimum == action.length
        memory, at = self._memory(action)
        if action.kind == t.ACT_READ_BASE:
            memory[at : at + action.length] = self.disk.read(action.offset, action.length)
        else:
            self.disk.write(action.offset, bytes(memory[at : at + action.length]))
        return action.length

    def _describe(self, action: t.Act) -> str:
        if action.kind == t.ACT_SYNC_BASE:
            return "sync"
        if action.kind == t.ACT_HOST:
            return f"host {HOST_NAMES[action.message]}"
        place = f"{action.offset}+{action.length}"
        if action.kind == t.ACT_READ_BASE:
            return f"read {place}"
        memory, at = self._memory(action)
        data = bytes(memory[at : at + action.length])
        if data == bytes(action.length):
            return f"zero {place}"
        if action.offset == 0 and action.length == PAGE:
            return f"head minor {ubiformat.parse_head(data).minor}"
        index = ubiformat.SLOT_OFFSETS.index(action.offset)
        slot = ubiformat.parse_slot(data[:SECTOR])
        assert slot.crc_fits
        assert not any(data[SECTOR:])
        state = "open" if slot.is_open else "closed"
        return f"slot {index}: sequence {slot.sequence} generation {slot.generation} {state}"

    # -- host calls; the others do nothing --

    def _find_table(self) -> None:
        found = self.tables.published.get(self.uuid)
        temporary = self.tables.temporary.get(self.uuid)
        self.steps.set_found(
            found.state if found else t.TABLE_NONE, found and found.identity,
            temporary.state if temporary else t.TABLE_NONE, temporary and temporary.identity,
        )

    def _drop_table(self) -> None:
        self.tables.published.pop(self.uuid, None)
        self.tables.temporary.pop(self.uuid, None)

    def _make_table(self) -> None:
        assert self.uuid not in self.tables.temporary
        self.rows = bytearray(self.steps.image_stripes)
        self.tables.temporary[self.uuid] = FoundTable(self.steps.identity, self.rows)
        self.steps.set_table(self.rows)

    def _map_table(self) -> None:
        self.rows = self.tables.published[self.uuid].rows
        self.steps.set_table(self.rows)

    def _publish_table(self) -> None:
        assert self.uuid not in self.tables.published
        self.tables.published[self.uuid] = self.tables.temporary.pop(self.uuid)

    def _latch_table(self) -> None:
        self.tables.published[self.uuid].identity["latch"] = self.steps.errno_

    def _unlink_table(self) -> None:
        del self.tables.published[self.uuid]


def open_base(disk: Disk, tables: Tables, **options: object) -> Opening:
    """Open or create, all the way."""
    opening = Opening(disk, tables, **options)
    opening.run(t.EVENT_START)
    assert opening.steps.phase == t.PHASE_OPEN, f"refused: {opening.steps.refusal}"
    return opening


def is_write(what: str) -> bool:
    """Whether an entry of a trace changes the base."""
    return what.startswith(("zero", "head", "slot"))
