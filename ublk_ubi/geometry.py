"""What a disk is stays what it is: its blocks, and its size, until `resize` (growth.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.files import holds_data, shown, size_text
from ublk_ubi.options import METADATA_SIZE

if TYPE_CHECKING:
    from ublk_ubi._opener import Opener
    from ublk_ubi.base import Base
    from ublk_ubi.session import Session


def settle(session: Session, opener: Opener) -> None:
    """Give a disk the blocks and the size that it had; one that is taken over has them.

    `opener` knows what the base says. `recorded_size` is what it shall say: whoever goes on with a
    table has written nothing yet. Raises UbiError; nothing is changed by then.
    """
    base, options = session.base, session.options
    found = opener.recorded_device_bytes
    blocks = keep_blocks(base, opener.block_bytes, session.block_size, options.block_size)
    if session.device.recovered:
        # It may grow yet: the kernel was told to by a daemon that died before it had an answer.
        fits = session.size <= found <= base.data_size
        session.recorded_size = found if fits else session.size
    else:
        room, recorded = session.size // blocks * blocks, found // blocks * blocks
        asked = options.size and options.size // blocks * blocks
        session.block_size = blocks
        session.size, warning = keep_size(base, recorded, room, asked)
        session.warnings += [warning] if warning else []
        session.recorded_size = found if recorded == session.size else session.size
    opener.set_device_bytes(session.recorded_size)


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

    What a base has grown by is the disk's if it is a hole in a file. Else it may hold what somebody
    wrote there once, as a volume's does, or a file's that was copied from one: it is the disk's
    when `resize` has zeroed it. `recorded` is the size that the base says its disk has (0:
    nothing), `room` what there is for it, `asked` an explicit --size. Raises UbiError when that is
    another, or a part of the disk is gone and --size does not say that it is not needed.
    """
    what = f"base {shown(base.path)}"
    if recorded > room:
        if asked == room:
            return room, None
        raise UbiError(
            f"{what} has room for {size_text(room)}, and its disk has {size_text(recorded)}: make "
            f"it as large as it was, or add it once with --size {room} to do without the rest",
        )
    size = recorded or room
    grown = size < room and not base.is_block and not holds_data(base.fd, METADATA_SIZE + size)
    if asked == size:
        return size, None
    if grown and asked in {None, room}:
        return room, None
    if asked is not None:
        makes, way_out = ("makes", "or name another base") if size == room else (
            "has", "and let `ublk-ubi resize` make it larger")
        raise UbiError(
            f"{what} {makes} a disk of {size_text(size)}, --size asks for {size_text(asked)}: "
            f"leave --size out, {way_out}",
            Exit.USAGE,
        )
    if size == room:
        return size, None
    return size, (
        f"{what} has grown: its disk keeps its {size_text(size)} until `ublk-ubi resize` makes it "
        f"{size_text(room)}, and zeroes what is new (--keep-old-data if a guest has used that "
        "elsewhere)"
    )
