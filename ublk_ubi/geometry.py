"""What a disk is stays what it is: its blocks, and its size, until `resize` (growth.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.files import shown, size_text

if TYPE_CHECKING:
    from ublk_ubi.base import Base


def keep_blocks(base: Base, recorded: int, needed: int, asked: int | None) -> int:
    """Return a disk's blocks, in bytes: those it was made with, as partition tables count in them.

    `recorded` is what the base says of them (0: nothing), `needed` what image and base take now,
    `asked` an explicit --block-size, which has the last word. Raises UbiError.
    """
    if recorded in (0, needed) or asked is not None:
        return needed
    what = f"base {shown(base.path)}"
    if recorded not in (512, 4096):
        raise UbiError(f"{what} records blocks of {recorded} bytes: upgrade ublk-ubi")
    if recorded < needed:
        raise UbiError(
            f"{what} was made with blocks of {recorded} bytes, and image or base now take "
            f"{needed} at least: put it where it was, or give --block-size {needed} if it holds "
            "no partition table",
        )
    return recorded


def keep_size(base: Base, recorded: int, room: int, asked: int | None) -> tuple[int, str | None]:
    """Return a disk's size in bytes, and a warning if the base has more room than that.

    A block device that has grown holds, in its new part, what somebody wrote there once: it is the
    disk's when `resize` has zeroed it. A file that has grown reads zero there, and is the disk's.
    `recorded` is the size that the base says its disk has (0: nothing), `room` what there is for
    it, `asked` an explicit --size, which is `room`. Raises UbiError when a part of a disk is gone,
    and nobody has said that it is not needed.
    """
    what = f"base {shown(base.path)}"
    if recorded > room and asked is None:
        raise UbiError(
            f"{what} has room for {size_text(room)}, and its disk has {size_text(recorded)}: make "
            f"it as large as it was, or give --size {room} to do without the rest",
        )
    if not base.is_block or recorded == 0 or recorded >= room:
        return room, None
    if asked is not None:
        raise UbiError(
            f"{what} has a disk of {size_text(recorded)}, --size asks for {size_text(asked)}: "
            "leave --size out, and let `ublk-ubi resize` zero the new part",
            Exit.USAGE,
        )
    return recorded, (
        f"{what} has grown: its disk keeps its {size_text(recorded)} until `ublk-ubi resize`, "
        f"which zeroes what is new and makes it {size_text(room)}"
    )
