"""Which bases may be opened and how: docs/on-disk-format.md and docs/durability.md as a function.

Shares nothing with the product. It gives every reason that speaks against a base, in no order: a
program may name any one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from unit.hostile import layout
from unit.hostile.layout import Disk, Slot

# What no writer reaches: a slot with a number that begins again at 0 would never count.
COUNTER_LIMIT = 1 << 62


class Identity(NamedTuple):
    """Whose table it is."""

    uuid: bytes
    fingerprint: bytes
    generation: int
    device: int
    inode: int
    image_bytes: int
    stripe_bytes: int
    image_stripes: int


@dataclass(frozen=True)
class Table:
    """A table's file as found; `state` is none, found, live or damaged."""

    state: str = "none"
    identity: Identity | None = None
    latch: int = 0
    rows: bytes = b""


@dataclass(frozen=True)
class Asked:
    """What an opener is told."""

    base_bytes: int
    image_bytes: int
    device: int = 1
    inode: int = 2
    fingerprint: bytes = b"f" * 32
    boot_id: bytes = b"b" * 16
    new_uuid: bytes = b"u" * 16
    stripe_bytes: int = 0
    default_stripe_bytes: int = 1 << 20
    block_bytes: int = 0
    device_bytes: int = 0              # to be recorded
    format: bool = False
    adopt: bool = False
    force: bool = False
    force_stale: bool = False
    no_image: bool = False             # what is recorded stands for size and fingerprint


@dataclass
class Judgement:
    """`reasons` against it; if there are none, `way`: create, adopt, open anew, go on."""

    reasons: set[str] = field(default_factory=set)
    way: str = ""
    slot: Slot | None = field(default=None, repr=False)
    slot_index: int = 1                # where the slot that counts is; the other is written next
    stripe: int = 0
    asked: Asked | None = field(default=None, repr=False)      # … with what the base records
    copied: bool = False               # it gets a UUID of its own

    @property
    def refused(self) -> bool:
        return bool(self.reasons)


def condition(data: bytes) -> str:
    """What a slot's 512 bytes are: zero, valid, newer or damaged."""
    if not any(data):
        return "zero"
    slot = layout.unpack(data)
    if slot.magic != layout.SLOT_MAGIC or slot.crc != layout.slot_crc(data):
        return "damaged"
    if slot.version != 1 or slot.incompat:
        return "newer"
    return "valid"


def newest(disk: Disk) -> Slot | None:
    """The slot that counts."""
    slots = [layout.unpack(data) for data in map(disk.slot, range(2)) if condition(data) == "valid"]
    return max(slots, key=lambda slot: slot.sequence, default=None)


def stripes_of(image_bytes: int, stripe_bytes: int) -> int:
    return -(-image_bytes // stripe_bytes)


def geometry(stripe: int, asked: Asked) -> set[str]:
    """Why a disk cannot have this stripe size."""
    if stripe not in (1 << power for power in range(16, 21)):
        return {"stripe_range"}
    if asked.image_bytes == 0:
        return {"damaged"}             # recorded: nobody has such an image
    reasons = set()
    stripes = stripes_of(asked.image_bytes, stripe)
    if stripes > layout.MAX_STRIPES:
        reasons.add("too_many_stripes")
    if asked.base_bytes < layout.METADATA + stripes * stripe:
        reasons.add("too_small")
    return reasons


def judge(disk: Disk, asked: Asked, table: Table, temporary: Table) -> Judgement:
    """Judge a base and what is found in the tables' folder for its UUID."""
    found = _judge(disk, asked, table, temporary)
    found.asked = found.asked or asked
    return found


def _judge(disk: Disk, asked: Asked, table: Table, temporary: Table) -> Judgement:
    if asked.format:
        return _new(asked)
    first = disk.read(0, layout.BLOCK)
    conditions = [condition(disk.slot(index)) for index in range(2)]
    if not first.startswith(layout.MAGIC):
        if not disk.blocks or _is_cut_short(disk, conditions):
            return _new(asked)
        return Judgement({"foreign"})
    found = Judgement()
    if first[9:11] != b"\0\0" or first[11:13] not in (b"\1\0", b"\2\0"):
        found.reasons.add("version")
    if "newer" in conditions:
        found.reasons.add("newer")
    elif conditions == ["zero", "zero"]:
        _judge_foreign_disk(found, first[13], asked)
    elif "valid" not in conditions:
        found.reasons.add("damaged")
    else:
        asked = _judge_recorded(found, disk, conditions, first[13], asked)
    if not found.refused:
        _judge_tables(found, disk, asked, table, temporary)
    return found


def _is_cut_short(disk: Disk, conditions: list[str]) -> bool:
    """All zero but for the slot that creation writes first."""
    if conditions != ["valid", "zero"] or layout.unpack(disk.slot(0)).sequence != 1:
        return False
    rest = disk.copy()
    rest.write(layout.SLOTS[0], bytes(layout.SECTOR))
    return not rest.blocks


def _new(asked: Asked) -> Judgement:
    stripe = asked.stripe_bytes or asked.default_stripe_bytes
    reasons = {"needs_image"} if asked.no_image else geometry(stripe, asked)
    return Judgement(reasons, "create", stripe=stripe)


def _judge_foreign_disk(found: Judgement, recorded: int, asked: Asked) -> None:
    """One of bdev_ubi's: its stripe size is known in part."""
    if not asked.adopt:
        found.reasons.add("adopt")
    if asked.no_image:
        found.reasons.add("needs_image")
    stripe = asked.stripe_bytes or recorded << 10
    if not stripe:
        found.reasons.add("stripe_unknown")
    elif stripe >> 10 & 0xFF != recorded:
        found.reasons.add("stripe_size")
    else:
        found.reasons |= geometry(stripe, asked)
    found.way, found.stripe = "adopt", stripe
    found.slot = Slot(
        sequence=0, stripe=stripe, image=asked.image_bytes, fingerprint=asked.fingerprint,
        uuid=asked.new_uuid,
    )


def _judge_recorded(
    found: Judgement, disk: Disk, conditions: list[str], recorded: int, asked: Asked,
) -> Asked:
    """A disk of ours: the valid slot with the higher sequence counts. What is asked, as it is."""
    valid = [index for index in range(2) if conditions[index] == "valid"]
    slots = {index: layout.unpack(disk.slot(index)) for index in valid}
    found.slot_index = max(valid, key=lambda index: (slots[index].sequence, -index))
    found.slot = slot = slots[found.slot_index]
    found.stripe = slot.stripe
    if asked.no_image:
        asked = replace(asked, image_bytes=slot.image, fingerprint=slot.fingerprint)
    if max(slot.sequence, slot.generation) >= COUNTER_LIMIT or recorded != slot.stripe >> 10 & 0xFF:
        found.reasons.add("damaged")
    if asked.stripe_bytes not in (0, slot.stripe):
        found.reasons.add("stripe_size")
    if asked.image_bytes != slot.image:
        found.reasons.add("image_size")
    if asked.fingerprint != slot.fingerprint and not asked.force:
        found.reasons.add("fingerprint")
    found.reasons |= geometry(slot.stripe, asked)
    if 0 < slot.device < stripes_of(slot.image, max(slot.stripe, 1)) * slot.stripe:
        found.reasons.add("damaged")   # no room for the image
    if asked.no_image and not found.refused:
        headers_ = headers(disk, stripes_of(slot.image, slot.stripe))
        if not all(headers_):
            found.reasons.add("needs_image")
    found.asked = asked
    return asked


def identity(slot: Slot, asked: Asked) -> Identity:
    """What the table of a slot's generation says of itself."""
    return Identity(
        slot.uuid, slot.fingerprint, slot.generation, asked.device, asked.inode, slot.image,
        slot.stripe, stripes_of(slot.image, slot.stripe),
    )


def _judge_tables(
    found: Judgement, disk: Disk, asked: Asked, table: Table, temporary: Table,
) -> None:
    slot = found.slot
    assert slot is not None
    expected = identity(slot, asked)
    if "live" in (table.state, temporary.state):
        found.reasons.add("live")
        return
    found.way = found.way or "open"
    reason = ""
    if not slot.flags & layout.OPEN:
        if table.state != "none" and table.identity != expected:
            reason = "copy"
    elif slot.boot != asked.boot_id:
        if table.state != "none":
            reason = "copy"
    elif table.identity == expected:
        found.way = "go on"
        if table.latch:
            reason = "latched"
        elif any(header and not row for header, row in zip(
                headers(disk, expected.image_stripes), table.rows, strict=True)):
            reason = "foreign_writer"
    elif table.state != "none" or temporary.identity != expected:
        reason = "stale"
    if reason and asked.force_stale:
        found.way = "open"
        # A table of a base in another place stays: this one may be a copy of that.
        found.copied = table.state == "found" and table.identity is not None and (
            (table.identity.device, table.identity.inode) != (asked.device, asked.inode))
    elif reason:
        found.reasons.add(reason)


def headers(disk: Disk, stripes: int) -> bytes:
    """The header bytes that say whether the base has a stripe."""
    return disk.read(layout.HEADERS, 2 * stripes)[::2]
