"""A live disk grows."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ublk_ubi import zeroing
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.files import holds_data, shown, size_of, size_text
from ublk_ubi.options import METADATA_SIZE

if TYPE_CHECKING:
    from ublk_ubi.session import Session


def prepare(session: Session, size: int | None, *, keep_old_data: bool) -> int:
    """Have room on the base for a disk of `size` bytes (None: of all that the base has).

    A base that is a file is grown to that; the new part reads zero. Returns the size, which is
    `take`n then. Raises UbiError; the disk is as it was in any case. May take long on a block
    device that does not zero by itself.
    """
    base, blocks = session.base, session.block_size
    has = _size_by_now(session)
    if size is not None and size % blocks:
        raise UbiError(
            f"the size {size} is no multiple of the disk's blocks of {blocks} bytes: use "
            f"{max(size // blocks, 1) * blocks}",
            Exit.USAGE,
        )
    if session.plane.latch:
        raise UbiError(f"{session.claim.name} cannot grow: {session.degraded()}", Exit.DEGRADED)
    try:
        before = size_of(base.fd) - METADATA_SIZE
        if size is not None and size > before:
            base.grow(METADATA_SIZE + size)
        found = (size_of(base.fd) - METADATA_SIZE) // blocks * blocks
        wanted = found if size is None else size
        if not has <= wanted <= found:
            way_out = (f"grow {shown(base.path)} first" if wanted > found
                       else "a disk can grow, not shrink")
            raise UbiError(
                f"{session.claim.name} has {size_text(has)}, its base room for "
                f"{size_text(found)}: it cannot have {size_text(wanted)}; {way_out}",
            )
        # What a file has just been made larger by is zero.
        start, old_end = METADATA_SIZE + has, METADATA_SIZE + min(wanted, before // blocks * blocks)
        old_data = old_end > start and (base.is_block or holds_data(base.fd, start))
        if old_data and not keep_old_data:
            zeroing.zero(base.fd, start, old_end - start, is_block=base.is_block)
    except OSError as error:
        raise UbiError(
            f"base {shown(base.path)}: its new part cannot be zeroed: {error.strerror}; "
            "--keep-old-data leaves it as it is",
        ) from None
    record(session, max(wanted, session.opener.recorded_device_bytes))
    return wanted


def _size_by_now(session: Session) -> int:
    """Tell how large the kernel's disk is, in bytes.

    It may have grown though it did not say so in time: a guest may have written there.
    """
    kernels = session.device.size_by_now()
    if kernels > session.size:
        session.plane.grow(kernels)
        session.size = kernels
    return session.size


def record(session: Session, size: int) -> None:
    """Have the base say how large its disk is, once the new part is durable as it shall be read.

    A guest's flush makes what guests have written durable, and nothing else. Raises UbiError.
    """
    if size == session.opener.recorded_device_bytes:
        return
    try:
        session.opener.grow(session, size)
    except OSError as error:
        if error.errno == errno.ESHUTDOWN:
            raise not_grown(session.claim.name) from None
        raise UbiError(
            f"base {shown(session.base.path)}: the disk's size cannot be recorded: "
            f"{error.strerror}; check its disk (see `dmesg`)",
        ) from None


def not_grown(name: str) -> UbiError:
    """Tell that a disk goes, or is another daemon's by now."""
    return UbiError(f"{name} is stopping: it has not grown", Exit.BUSY)


def take(session: Session, size: int) -> None:
    """Let the disk have the size that was prepared.

    Raises UbiError; the kernel's disk is as it was then, or (TIMED_OUT) may still grow.
    """
    if size > session.size:
        session.plane.grow(size)
        session.device.resize(size)
        session.size = size
        session.base.size = size_of(session.base.fd)
        session.record_state()
