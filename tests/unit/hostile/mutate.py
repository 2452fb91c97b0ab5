"""Cases for hypothesis: sound bases of every kind, and what may have happened to their bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from hypothesis import strategies as st
from unit.hostile import layout, rules
from unit.hostile.layout import Disk, Slot
from unit.hostile.rules import Asked, Identity, Table

STRIPES = tuple(1 << power for power in range(16, 21))
# One stripe, a short last stripe, ends of header pages.
IMAGES = (1, 65536, 65537, 1 << 20, 20 << 20, 2041 << 16, 2042 << 16, 4089 << 16)
# What a base was, and how many cases of each happening to it are worth the time.
KINDS = {
    "closed": 10, "open here": 14, "open elsewhere": 7, "bdev_ubi": 12, "blank": 2, "cut short": 4,
    "something else": 2, "noise": 2,
}
OURS = ("closed", "open here", "open elsewhere")
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4095, 4096, 65535, 65536, 1 << 20, 1 << 21, (1 << 31) - 1, 1 << 31,
     (1 << 32) - 1, 1 << 32, 1 << 43, (1 << 62) - 1, 1 << 62, (1 << 63) - 2, (1 << 63) - 1, 1 << 63,
     (1 << 64) - 2, (1 << 64) - 1],
)


@dataclass(frozen=True, repr=False)
class Case:
    """A base with its surroundings, before and after what happened to it."""

    kind: str
    asked: Asked
    disk: Disk
    table: Table
    temporary: Table
    changes: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"{self.kind}; {self.changes}; {self.asked}; table {_short(self.table)}; "
            f"temporary {_short(self.temporary)}; slots {[_slot(self.disk, i) for i in range(2)]}; "
            f"head {self.disk.read(0, 32).hex()}"
        )


def _short(table: Table) -> str:
    return f"{table.state} {table.identity} latch {table.latch} rows {len(table.rows)}"


def _slot(disk: Disk, index: int) -> str:
    data = disk.slot(index)
    return f"{rules.condition(data)} {layout.unpack(data)._replace(rest=b'')}"


# -- sound ones ------------------------------------------------------------------------------------

@st.composite
def sound(draw: st.DrawFn, kind: str) -> Case:
    """A base as a program left it, opened as it should be."""
    stripe = draw(st.sampled_from(STRIPES))
    image = draw(st.sampled_from(IMAGES))
    stripes = rules.stripes_of(image, stripe)
    asked = Asked(
        base_bytes=layout.METADATA + stripes * stripe + draw(st.sampled_from([0, 512, 1 << 30])),
        image_bytes=image, default_stripe_bytes=stripe,
        block_bytes=draw(st.sampled_from([512, 4096])),
        device_bytes=draw(st.sampled_from([0, stripes * stripe, 1 << 40])),
        adopt=kind == "bdev_ubi" and draw(st.sampled_from([True, True, True, False])),
        stripe_bytes=draw(st.sampled_from([0, 0, stripe])),
    )
    disk, table, temporary = Disk(), Table(), Table()
    newest = draw(st.integers(2, 9))
    slot = Slot(
        sequence=newest, stripe=stripe, image=image, fingerprint=asked.fingerprint, uuid=b"U" * 16,
        generation=draw(st.integers(1, 5)), boot=asked.boot_id,
        block=draw(st.sampled_from([0, 512, 4096])),
        device=draw(st.sampled_from([0, stripes * stripe, asked.base_bytes, 1 << 62])),
    )
    if kind in ("open here", "open elsewhere"):
        boot = asked.boot_id if kind == "open here" else b"e" * 16
        slot = slot._replace(flags=layout.OPEN, boot=boot)
    if kind in OURS:
        disk.write(0, layout.head(stripe, 2 if slot.flags else 1))
        disk.write(layout.SLOTS[(newest + 1) % 2], slot.sealed())
        disk.write(layout.SLOTS[newest % 2], slot._replace(sequence=newest - 1).sealed())
    elif kind == "bdev_ubi":
        disk.write(0, layout.head(stripe, 1))
    elif kind == "cut short":
        disk.write(layout.SLOTS[0], slot._replace(sequence=1, generation=0).sealed())
    elif kind == "something else":
        disk.write(draw(st.integers(1, layout.METADATA - 8)), b"\xeb\x3c\x90mkfs")
    elif kind == "noise":
        for number in (0, 1, 1280, 1281):
            disk.write(number * layout.BLOCK, draw(st.binary(min_size=16, max_size=64)) * 64)
    headers = _bits(draw, disk, stripes) if kind in (*OURS, "bdev_ubi") else bytes(stripes)
    if kind == "open here":
        table = Table("found", rules.identity(slot, asked), 0, _rows(draw, headers))
    return Case(kind, asked, disk, table, temporary, ())


def _bits(draw: st.DrawFn, disk: Disk, stripes: int) -> bytes:
    """Set some header bits; return all of them."""
    for stripe in draw(st.lists(st.integers(0, stripes - 1), max_size=4)):
        disk.write(layout.HEADERS + 2 * stripe, bytes([draw(st.sampled_from([1, 1, 1, 255]))]))
    return rules.headers(disk, stripes)


def _rows(draw: st.DrawFn, headers: bytes) -> bytes:
    """A table has every header bit, and knows of more."""
    rows = bytearray(headers)
    for stripe in draw(st.lists(st.integers(0, len(rows) - 1), max_size=4)):
        rows[stripe] = 1
    return bytes(rows)


# -- what happens to them --------------------------------------------------------------------------

@st.composite
def hostile(draw: st.DrawFn, kind: str, first: str) -> Case:
    """A base to which something has happened, and perhaps more after that."""
    case = (HAPPENINGS | DIRECTED)[first](draw, draw(sound(kind)))
    for name in draw(st.lists(st.sampled_from(sorted(HAPPENINGS)), max_size=2)):
        case = HAPPENINGS[name](draw, case)
    return case


def anything() -> st.SearchStrategy[Case]:
    """All of them."""
    return st.one_of([hostile(kind, first) for kind in KINDS for first in sorted(HAPPENINGS)])


def _after(case: Case, what: str, **fields: object) -> Case:
    return dataclasses.replace(case, changes=(*case.changes, what), **fields)


def _bytes_change(draw: st.DrawFn, case: Case) -> Case:
    """Any bytes anywhere, mostly where it matters."""
    places = st.one_of(
        st.integers(0, 16), st.integers(9, 1 << 13), st.integers(9, 1 << 13),
        st.integers(0, layout.METADATA - 24),
        st.builds(lambda slot, at: slot + at, st.sampled_from(layout.SLOTS), st.integers(0, 511)),
    )
    offset, data = draw(places), draw(st.binary(min_size=1, max_size=24))
    disk = case.disk.copy()
    disk.write(offset, data)
    return _after(case, f"{data.hex()} at {offset}", disk=disk)


def _head_changes(draw: st.DrawFn, case: Case) -> Case:
    """Version or stripe size."""
    offset = draw(st.sampled_from([9, 10, 11, 12, 13, 13, 13]))
    value = draw(st.sampled_from([0, 1, 2, 0x40, 0x41, 0x80, 0xC0, 0xFF]))
    disk = case.disk.copy()
    disk.write(offset, bytes([value]))
    return _after(case, f"byte {offset} is {value}", disk=disk)


def _slot_changes(draw: st.DrawFn, case: Case, name: str = "") -> Case:
    """A field of a slot, mostly under a checksum that fits."""
    index = draw(st.integers(0, 1))
    name = name or draw(st.sampled_from(sorted(layout.FIELDS)))
    offset, length = layout.FIELDS[name]
    data = case.disk.slot(index)
    if length <= 8 and name != "magic":
        old = int.from_bytes(data[offset : offset + length], "little")
        number = draw(st.one_of(NUMBERS, st.integers(-2, 2).map(lambda step: old + step)))
        value = (number % (1 << 8 * length)).to_bytes(length, "little")
    else:
        value = draw(st.sampled_from([bytes(length), b"\xff" * length, b"x" * length]))
    data = data[:offset] + value + data[offset + length :]
    sealed = draw(st.integers(0, 4)) < 4 and name != "crc"
    disk = case.disk.copy()
    disk.write(layout.SLOTS[index], layout.seal(data) if sealed else data)
    return _after(case, f"slot {index}: {name} {value[:8].hex()} sealed {sealed}", disk=disk)


def _slots_move(draw: st.DrawFn, case: Case) -> Case:
    """A slot is lost, torn, or is where the other was."""
    index, way = draw(st.integers(0, 1)), draw(st.sampled_from(["zero", "copy", "torn"]))
    other = case.disk.slot(1 - index)
    cut = draw(st.integers(1, 511))
    torn = other[:cut] + case.disk.slot(index)[cut:]
    data = {"zero": bytes(512), "copy": other, "torn": torn}[way]
    disk = case.disk.copy()
    disk.write(layout.SLOTS[index], data)
    return _after(case, f"slot {index}: {way}", disk=disk)


def _block_lost(draw: st.DrawFn, case: Case) -> Case:
    """A block of 4 KiB is zero."""
    number = draw(st.sampled_from([0, 0, 1, 1280, 1281]))
    disk = case.disk.copy()
    disk.write(number * layout.BLOCK, bytes(layout.BLOCK))
    return _after(case, f"block {number} lost", disk=disk)


OPTIONS = (
    "format", "adopt", "force", "force_stale", "stripe_bytes", "base_bytes", "image_bytes",
    "fingerprint", "boot_id", "inode", "no_image",
)


def _other_options(draw: st.DrawFn, case: Case, name: str = "") -> Case:
    """It is opened as something that it is not."""
    asked = case.asked
    name = name or draw(st.sampled_from(OPTIONS))
    if name == "no_image":
        return _no_image(draw, case)
    values = {
        "format": True, "adopt": not asked.adopt, "force": True, "force_stale": True,
        "stripe_bytes": draw(st.sampled_from([0, *STRIPES])),
        "base_bytes": draw(st.sampled_from([layout.METADATA, asked.base_bytes - 512])),
        "image_bytes": max(1, asked.image_bytes + draw(st.sampled_from([-1, 1]))),
        "fingerprint": b"g" * 32, "boot_id": b"e" * 16, "inode": 3,
    }
    return _after(
        case, f"asked {name}", asked=dataclasses.replace(asked, **{name: values[name]}),
    )


def _no_image(draw: st.DrawFn, case: Case) -> Case:
    """The base shall do without, and often it can."""
    disk, table = case.disk, case.table
    asked = dataclasses.replace(case.asked, no_image=True, image_bytes=0, fingerprint=bytes(32))
    if draw(st.integers(0, 3)) < 3:
        newest = rules.newest(disk)
        stripes = rules.stripes_of(newest.image, newest.stripe) if newest else 1
        disk = disk.copy()
        disk.write(layout.HEADERS, b"\1\0" * stripes)
        table = dataclasses.replace(table, rows=b"\1" * len(table.rows))
    return _after(case, "no image", asked=asked, disk=disk, table=table)


TABLES = ("lost", "live", "damaged", "latched", "moved", "both", "field", "rows")


def _table_changes(draw: st.DrawFn, case: Case, way: str = "") -> Case:
    """The table is another one, or not there; or it is there under its temporary name."""
    way = way or draw(st.sampled_from(TABLES))
    table, temporary = case.table, case.temporary
    if way in ("lost", "live", "damaged"):
        table = Table({"lost": "none"}.get(way, way))
    elif way == "moved":
        table, temporary = temporary, table
    elif way == "both":
        table, temporary = Table("damaged"), table
    elif table.identity is None:
        sizes = (case.asked.image_bytes, 65536, rules.stripes_of(case.asked.image_bytes, 65536))
        named = Identity(b"U" * 16, b"f" * 32, draw(st.integers(0, 5)), 1, 2, *sizes)
        table = Table("found", named, 0, bytes(named.image_stripes))
    elif way == "latched":
        table = dataclasses.replace(table, latch=draw(st.sampled_from([5, (1 << 32) - 1])))
    elif way == "rows":
        row = draw(st.sampled_from([b"\0", b"\1", b"\xff"]))
        table = dataclasses.replace(table, rows=row * len(table.rows))
        # A header bit that a table without rows does not know.
        disk = case.disk.copy()
        disk.write(layout.HEADERS, b"\1")
        case = dataclasses.replace(case, disk=disk)
    else:
        table = dataclasses.replace(table, identity=_other_identity(draw, table.identity))
    return _after(case, f"table {way}", table=table, temporary=temporary)


def _other_identity(draw: st.DrawFn, identity: Identity) -> Identity:
    name = draw(st.sampled_from(Identity._fields))
    old = getattr(identity, name)
    if isinstance(old, bytes):
        return identity._replace(**{name: b"x" * len(old)})
    limit = 32 if name in ("stripe_bytes", "image_stripes") else 64
    return identity._replace(**{name: draw(NUMBERS) % (1 << limit)})


HAPPENINGS = {
    "nothing": lambda _draw, case: case,
    "bytes": _bytes_change,
    "head": _head_changes,
    "slot": _slot_changes,
    "slots": _slots_move,
    "block": _block_lost,
    "options": _other_options,
    "table": _table_changes,
}
# Each of what those draw first. Few cases are needed: there is little left to be drawn.
DIRECTED = {
    **{f"slot: {name}": partial(_slot_changes, name=name) for name in layout.FIELDS},
    **{f"options: {name}": partial(_other_options, name=name) for name in OPTIONS},
    **{f"table: {way}": partial(_table_changes, way=way) for way in TABLES},
}


def plan(kinds: dict[str, int]) -> list[tuple[str, str, int]]:
    """Kind, happening, and how many cases of it are worth the time."""
    return [(kind, first, examples) for kind, examples in kinds.items() for first in HAPPENINGS] + [
        (kind, first, 6 if first == "options: no_image" else 2)
        for kind in kinds if kind in ("closed", "open here") for first in DIRECTED
    ]
