"""A live disk grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublk_ubi import zeroing
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.files import shown, size_of, size_text
from ublk_ubi.options import METADATA_SIZE

if TYPE_CHECKING:
    from ublk_ubi.session import Session


def grow(session: Session, size: int | None, *, keep_old_data: bool) -> int:
    """Make the disk as large as its base, which is grown to `size` first if that is told.

    Returns the new size in bytes. Raises UbiError; then the disk is as it was. May take long on a
    block device that does not zero by itself.
    """
    base, blocks = session.base, session.block_size
    if size is not None and METADATA_SIZE + size > size_of(base.fd):
        base.grow(METADATA_SIZE + size)
    found = (size_of(base.fd) - METADATA_SIZE) // blocks * blocks
    wanted = found if size is None else size
    if wanted % blocks:
        raise UbiError(
            f"--size {wanted} is no multiple of the disk's blocks of {blocks} bytes: "
            f"use {wanted // blocks * blocks}",
            Exit.USAGE,
        )
    if not session.size <= wanted <= found:
        way_out = (f"grow {shown(base.path)} first" if wanted > found
                   else "a disk can grow, not shrink")
        raise UbiError(
            f"{session.claim.name} has {size_text(session.size)}, its base room for "
            f"{size_text(found)}: it cannot have {size_text(wanted)}; {way_out}",
        )
    if wanted > session.size:
        if base.is_block and not keep_old_data:
            start = METADATA_SIZE + session.size
            zeroing.zero(base.fd, start, wanted - session.size, is_block=True)
        session.plane.grow(wanted)
        session.device.resize(wanted)
        session.size = wanted
        base.size = size_of(base.fd)
        session.record_state()
    return session.size
