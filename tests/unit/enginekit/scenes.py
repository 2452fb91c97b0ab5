"""Bases in the conditions in which daemons find them, and the ways to open and close them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from enginekit import ubiformat
from enginekit.basedisk import Disk, FoundTable, Opening, Tables, open_base
from ublk_ubi import _testing as t

if TYPE_CHECKING:
    from collections.abc import Callable

STRIPES = 4                        # of the default image and stripe size
HERE, ELSEWHERE = b"b" * 16, b"B" * 16
UUID = b"u" * 16


def made(*headers: int, is_open: bool = False, boot_id: bytes = HERE,
         **options) -> tuple[Disk, Tables]:
    """Make a disk that was opened once, with header bits; open: its daemon has died."""
    disk, tables = Disk(), Tables()
    opening = open_base(disk, tables, boot_id=boot_id, **options)
    opening.commit(*headers)
    if not is_open:
        opening.run(t.EVENT_STOP)
        assert opening.steps.phase == t.PHASE_CLOSED
    return disk, tables


def identity_on(disk: Disk) -> dict:
    """Give the identity of the table that belongs to a disk as it is, by its slot."""
    slot = disk.current()
    return {
        "uuid": slot.uuid, "fingerprint": slot.fingerprint, "generation": slot.generation,
        "device": 1, "inode": 2, "image_bytes": slot.image_bytes,
        "stripe_bytes": slot.stripe_bytes,
        "image_stripes": -(-slot.image_bytes // slot.stripe_bytes), "latch": 0,
    }


def bdev_ubi_disk(stripe_byte: int, minor: int = 1) -> Disk:
    """Make a disk as bdev_ubi leaves it: magic, 0.1, headers; its padding is zero."""
    disk = Disk()
    disk.put(0, ubiformat.build_head(stripe_byte=stripe_byte, minor=minor))
    disk.set_header(0, b"\1\0")
    disk.set_header(2, b"\1\x99")
    return disk


@dataclass(frozen=True, eq=False)
class Scene:
    """A way to open, grow or close, and what it starts from."""

    make: Callable[[], tuple[Disk, Tables]]
    options: dict
    states: bytes                  # of the stripes in the end
    then: int = t.EVENT_START


def stale_temporary() -> tuple[Disk, Tables]:
    """Make a disk whose next opening died before it wrote anything."""
    disk, tables = made(1)
    tables.temporary[UUID] = FoundTable(identity_on(disk) | {"generation": 2}, bytearray(STRIPES))
    return disk, tables


def never_live() -> tuple[Disk, Tables]:
    """Make a disk whose opening died between the slot and the table's name."""
    disk, tables = made(1, is_open=True)
    tables.temporary, tables.published = tables.published, {}
    return disk, tables


def killed() -> tuple[Disk, Tables]:
    """Make a disk whose daemon died, and its table, which knows more than the base."""
    disk, tables = made(1, is_open=True)
    tables.published[UUID].rows[2] = 1
    return disk, tables


def foreign_bit() -> tuple[Disk, Tables]:
    """Make a disk that another program wrote to after its daemon died."""
    disk, tables = killed()
    disk.set_header(3)
    return disk, tables


def _states(present: int | None = None, *durable: int) -> bytes:
    states = bytearray(STRIPES)
    for stripe in durable:
        states[stripe] = t.DURABLE
    if present is not None:
        states[present] = t.PRESENT
    return bytes(states)


SCENES = {
    "creating": Scene(lambda: (Disk(), Tables()), {}, _states()),
    "formatting": Scene(lambda: made(1), {"format": True, "new_uuid": b"n" * 16}, _states()),
    "new": Scene(lambda: made(1), {}, _states(None, 1)),
    "dropping": Scene(stale_temporary, {}, _states(None, 1)),
    "never live": Scene(never_live, {}, _states(None, 1)),
    "going on": Scene(killed, {}, _states(2, 1)),
    "forcing": Scene(foreign_bit, {"force_stale": True}, _states(None, 1, 3)),
    "adopting": Scene(lambda: (bdev_ubi_disk(0), Tables()),
                      {"adopt": True, "stripe_bytes": 1 << 20}, _states(None, 0, 2)),
    "growing": Scene(lambda: made(1), {}, _states(None, 1), t.EVENT_GROW),
    "closing": Scene(lambda: made(1), {}, _states(None, 1), t.EVENT_STOP),
}

OPENINGS = [name for name, scene in SCENES.items() if scene.then == t.EVENT_START]


@functools.cache
def _made_once(scene: Scene) -> tuple[Disk, Tables]:
    return scene.make()


def played(scene: Scene, **how: int) -> Opening:
    """Play a scene's last act, as `how` says."""
    disk, tables = _made_once(scene)
    opening = Opening(disk.copy(), tables.copy(), **scene.options)
    if scene.then != t.EVENT_START:
        opening.run(t.EVENT_START)
        opening.trace.clear()
    opening.run(scene.then, offset=64 << 20 if scene.then == t.EVENT_GROW else 0, **how)
    return opening
