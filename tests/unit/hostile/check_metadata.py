"""The lifecycle engine, a step at a time, on a disk that may hold anything.

It accepts a base exactly when the rules do, refuses for a reason that they know, writes nothing
to what it refuses, and what it writes to the others is a sound base again.
"""

from __future__ import annotations

import dataclasses
from array import array

from hypothesis import given
from ublk_ubi._testing import LifecycleSteps
from unit.hostile import layout, mutate, report, rules
from unit.hostile.layout import Disk
from unit.hostile.rules import Asked, Table

from ublk_ubi import _testing, metadata
from ublk_ubi._opener import REFUSALS

STATES = {"none": _testing.TABLE_NONE, "found": _testing.TABLE_FOUND, "live": _testing.TABLE_LIVE,
          "damaged": _testing.TABLE_DAMAGED}
MEMORY_UNIT = {_testing.MEM_PAGE: layout.BLOCK, _testing.MEM_SCRATCH: 1}

last = report.Last()


def exactly(rows: bytes) -> array[int]:
    """Memory that ends where the rows do: a slice's does, a bytearray's has a byte more."""
    return array("B", rows)[:]


class Host:
    """Does what the engine asks for: I/O on a disk, and calls of its host."""

    def __init__(self, case: mutate.Case) -> None:
        self.case = case
        self.disk = case.disk.copy()
        self.table = case.table
        self.calls: list[int] = []
        self.writes: list[tuple[int, int]] = []
        self.rows = array("B")
        self.creates = False
        options = {name: getattr(case.asked, name) for name in Asked.__annotations__}
        self.steps = LifecycleSteps(**options)

    def run(self, kind: int) -> None:
        """Step until the engine asks for nothing more."""
        act = self.steps.step(kind)
        while act is not None:
            if act.kind == _testing.ACT_HOST:
                self.call(act.message)
            elif act.kind != _testing.ACT_SYNC_BASE:
                self.transfer(act)
            act = self.steps.step(_testing.EVENT_DONE)

    def transfer(self, act) -> None:
        memory = self.steps.pages if act.memory == _testing.MEM_PAGE else self.steps.scratch
        start = act.index * MEMORY_UNIT[act.memory]
        assert act.offset % layout.SECTOR == act.length % layout.SECTOR == 0
        assert start + act.length <= len(memory), act
        if act.kind == _testing.ACT_READ_BASE:
            memory[start : start + act.length] = self.disk.read(act.offset, act.length)
        else:
            assert _testing.HOST_BEFORE_WRITE in self.calls, "everything is checked before a write"
            newest = rules.newest(self.disk)
            index = layout.SLOTS.index(act.offset) if act.offset in layout.SLOTS else None
            if newest is not None and index is not None and not self.creates:
                assert self.disk.slot(1 - index) == newest.sealed(), "what counts is kept"
            self.disk.write(act.offset, bytes(memory[start : start + act.length]))
            self.writes.append((act.offset, act.length))

    def call(self, message: int) -> None:
        self.calls.append(message)
        if message == _testing.HOST_FIND_TABLE:
            self.steps.set_found(
                STATES[self.table.state], self.identity(self.table),
                STATES[self.case.temporary.state], self.identity(self.case.temporary),
            )
        elif message == _testing.HOST_MAKE_TABLE:
            self.rows = exactly(bytes(self.steps.identity["image_stripes"]))
            self.steps.set_table(self.rows)
        elif message == _testing.HOST_MAP_TABLE:
            self.rows = exactly(self.table.rows)
            self.steps.set_table(self.rows)

    def identity(self, table: Table) -> dict[str, object] | None:
        return table.identity and {**table.identity._asdict(), "latch": table.latch}


def judged_by_the_rules(case: mutate.Case) -> None:
    last.note(case)
    verdict = rules.judge(case.disk, case.asked, case.table, case.temporary)
    host = Host(case)
    host.creates = verdict.way == "create"
    host.run(_testing.EVENT_START)
    host.creates = False
    if host.steps.phase != _testing.PHASE_OPEN:
        reason = REFUSALS[host.steps.refusal]
        report.counts[f"refused: {reason}"] += 1
        assert host.steps.phase == _testing.PHASE_FAILED
        assert reason in verdict.reasons, f"{reason}, not {verdict}"
        assert not host.writes
        assert host.disk == case.disk
        forbidden = {_testing.HOST_MAKE_TABLE, _testing.HOST_DROP_TABLE, _testing.HOST_ZERO_TAIL}
        assert not forbidden & set(host.calls)
        return
    without = " without an image" if case.asked.no_image else ""
    report.counts[f"opened: {verdict.way}{without}"] += 1
    assert not verdict.refused, f"opened in spite of {verdict.reasons}"
    is_opened_as_the_rules_say(host, verdict)
    is_sound_once_closed(host, verdict.asked)


def is_opened_as_the_rules_say(host: Host, verdict: rules.Judgement) -> None:
    """What it wrote, what it knows, and that the next opener will see that it is open."""
    case, asked, disk = host.case, verdict.asked, host.disk
    stripes = rules.stripes_of(asked.image_bytes, verdict.stripe)
    assert (host.steps.stripe_bytes, host.steps.image_stripes) == (verdict.stripe, stripes)
    assert host.steps.going_on == (verdict.way == "go on")
    if verdict.way == "create":
        assert not disk.without_head_and_slots().blocks
    else:
        assert disk.without_head_and_slots() == case.disk.without_head_and_slots()
    if verdict.way == "go on":
        assert not host.writes
        known = case.table.rows
    else:
        names_its_table(host, verdict)
        known = rules.headers(disk, stripes)
        assert bytes(host.rows) == bytes(map(bool, known))
    states, undurable = host.steps.states()
    headers = rules.headers(disk, stripes)
    expected = bytes(
        _testing.DURABLE if header else _testing.PRESENT if row else _testing.ABSENT
        for header, row in zip(headers, known, strict=True)
    )
    assert states == expected
    assert undurable == expected.count(_testing.PRESENT)


def names_its_table(host: Host, verdict: rules.Judgement) -> None:
    """The base is open at the next generation."""
    disk, asked = host.disk, verdict.asked
    slot = rules.newest(disk)
    assert slot is not None
    assert slot.flags & layout.OPEN
    assert (slot.boot, slot.fingerprint) == (asked.boot_id, asked.fingerprint)
    assert slot.generation == (verdict.slot.generation if verdict.slot else 0) + 1
    assert slot.block == ((verdict.slot.block if verdict.slot else 0) or asked.block_bytes)
    assert slot.device == (asked.device_bytes or (verdict.slot.device if verdict.slot else 0))
    if verdict.slot is not None:
        assert slot.uuid == (asked.new_uuid if verdict.copied else verdict.slot.uuid)
    assert disk.read(0, 14) == layout.head(verdict.stripe, 2)
    expected = rules.identity(slot, asked)
    assert host.steps.identity == {**expected._asdict(), "latch": 0}
    agrees(disk, slot)


def agrees(disk: Disk, slot: layout.Slot) -> None:
    """`inspect` reads the same as the engine has written."""
    slots = [metadata.parse_slot(disk.slot(index)).extension for index in range(2)]
    newest = max((seen for seen in slots if seen is not None), key=lambda seen: seen.sequence)
    assert newest.sequence == slot.sequence
    assert newest.generation == slot.generation
    assert newest.is_open == bool(slot.flags & layout.OPEN)


def is_sound_once_closed(host: Host, asked: Asked) -> None:
    """A clean stop leaves a base that may be opened anew."""
    stripes = host.steps.image_stripes
    before = host.disk.without_head_and_slots()
    host.run(_testing.EVENT_STOP)
    assert host.steps.phase == _testing.PHASE_CLOSED
    assert host.calls[-1] == _testing.HOST_UNLINK_TABLE
    assert host.disk.without_head_and_slots() == before
    again = Asked(
        base_bytes=asked.base_bytes, image_bytes=asked.image_bytes,
        fingerprint=layout.unpack(host.steps.slot).fingerprint, boot_id=b"n" * 16,
    )
    verdict = rules.judge(host.disk, again, Table(), Table())
    assert not verdict.refused, verdict
    assert (verdict.way, rules.stripes_of(again.image_bytes, verdict.stripe)) == ("open", stripes)


def what_was_once_accepted() -> None:
    """Bases that the engine took for sound, each by a mistake of its own."""
    asked = Asked(layout.METADATA + 65536, 65536)
    slot = layout.Slot(sequence=2, generation=1, fingerprint=asked.fingerprint)
    closed = Disk()
    closed.write(0, layout.head(65536, 1))
    closed.write(layout.SLOTS[1], slot.sealed())

    # The next write's sequence would be 0: this slot would count for ever, also once it is old.
    last_sequence = closed.copy()
    last_sequence.write(layout.SLOTS[0], slot._replace(sequence=(1 << 64) - 1).sealed())
    # bdev_ubi has made a disk of its own and kept our slots: headers are of other stripes.
    other_stripes = closed.copy()
    other_stripes.write(0, layout.head(131072, 1))
    # Not a creation that was cut short: there is something, and page 0 was lost.
    first = slot._replace(sequence=1, generation=0).sealed()
    page_lost = Disk()
    page_lost.write(layout.SLOTS[0], first)
    page_lost.write(layout.SLOTS[1], slot.sealed()[:511] + b"\xff")
    headers_left = Disk()
    headers_left.write(layout.SLOTS[0], first)
    headers_left.write(2 * layout.BLOCK, b"\1")

    # Nobody has such an image; without one at hand it ended the process.
    sizes = {f"an image of {size}": closed.copy() for size in (0, (1 << 64) - 1)}
    for size, disk in zip((0, (1 << 64) - 1), sizes.values(), strict=True):
        disk.write(layout.SLOTS[1], slot._replace(image=size).sealed())
    for name, disk in sizes.items():
        without = dataclasses.replace(asked, image_bytes=0, fingerprint=bytes(32), no_image=True)
        judged_by_the_rules(mutate.Case(name, without, disk, Table(), Table(), ()))

    cases = {
        "the last sequence": last_sequence, "other stripes": other_stripes,
        "page 0 lost": page_lost, "headers left": headers_left,
    }
    for name, disk in cases.items():
        judged_by_the_rules(mutate.Case(name, asked, disk, Table(), Table(), ()))


def the_most_stripes_there_can_be() -> None:
    """Every header page is used; one stripe more is refused."""
    stripe = 65536
    image = stripe * layout.MAX_STRIPES
    slot = layout.Slot(
        sequence=2, stripe=stripe, image=image, fingerprint=b"f" * 32, flags=layout.OPEN,
        generation=1, boot=b"b" * 16,
    )
    for more in (0, stripe):
        asked = Asked(layout.METADATA + image + stripe, image + more)
        slot = slot._replace(image=image + more)
        disk = Disk()
        disk.write(0, layout.head(stripe, 2))
        disk.write(layout.SLOTS[1], slot.sealed())
        disk.write(layout.HEADERS + 2 * layout.MAX_STRIPES - 2, b"\1\0")
        rows = bytes(layout.MAX_STRIPES - 1 + more // stripe) + b"\1"
        table = Table("found", rules.identity(slot, asked), 0, rows)
        host = Host(mutate.Case("largest", asked, disk, table, Table(), ()))
        last.note(host.case)
        host.run(_testing.EVENT_START)
        if more:
            assert REFUSALS[host.steps.refusal] == "too_many_stripes"
            continue
        states, undurable = host.steps.states()
        assert (states.count(_testing.DURABLE), states[-1], undurable) == (1, _testing.DURABLE, 0)


@report.profile(50)
@given(mutate.anything())
def inspect_reads_anything(case: mutate.Case) -> None:
    """The reader without the engine has no opinion, but no fit either."""
    last.note(case)
    seen = metadata.parse(case.disk.read(0, layout.METADATA))
    assert seen.magic == case.disk.read(0, 9).startswith(layout.MAGIC)
    for index, slot in enumerate(seen.slots):
        valid = rules.condition(case.disk.slot(index)) == "valid"
        assert (slot.extension is None) == bool(slot.problem) or slot.is_zero
        assert valid or slot.extension is None


if __name__ == "__main__":
    known = set(REFUSALS) - {"nothing", "io", "too_many_stripes"}
    ways = ("create", "adopt", "open", "go on", "open without an image")
    for number in report.rounds({f"refused: {reason}" for reason in known} | {
            f"opened: {way}" for way in ways}):
        for kind, first, examples in mutate.plan(mutate.KINDS):
            cases = mutate.hostile(kind, first)
            report.profile(examples, number)(given(cases)(judged_by_the_rules))()
    what_was_once_accepted()
    the_most_stripes_there_can_be()
    inspect_reads_anything()
    report.finish()
