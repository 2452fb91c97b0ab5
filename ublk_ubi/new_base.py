"""What a new base holds behind its image: nobody may read there what was on the disk before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublk_ubi import zeroing
from ublk_ubi.errors import UbiError
from ublk_ubi.files import SECTOR_SIZE, shown, size_text
from ublk_ubi.options import METADATA_SIZE

if TYPE_CHECKING:
    from ublk_ubi._opener import Opener
    from ublk_ubi.base import Base
    from ublk_ubi.options import DeviceOptions


def check_tail(base: Base, opener: Opener, options: DeviceOptions) -> None:
    """Refuse to zero a large disk without help of the disk, which takes hours, unless told to."""
    _, length = _tail(base, opener)
    if not base.is_block or length <= 0 or options.zero or options.keep_old_data:
        return
    if not zeroing.offloaded(base.fd):
        raise UbiError(
            f"base {shown(base.path)} is {size_text(length)} larger than its image, and what "
            "was written there before would be readable: --zero overwrites it (this may take "
            "long), --keep-old-data leaves it",
        )


def zero_tail(base: Base, opener: Opener, options: DeviceOptions) -> None:
    """Zero it, unless it is zero or shall be kept. Raises UbiError."""
    start, length = _tail(base, opener)
    if length <= 0 or base.created or options.keep_old_data:
        return
    try:
        zeroing.zero(base.fd, start, length, is_block=base.is_block)
    except OSError as error:
        raise UbiError(
            f"base {shown(base.path)}: the {size_text(length)} behind its image cannot be "
            f"zeroed: {error.strerror}; --keep-old-data leaves them as they are",
        ) from None


def _tail(base: Base, opener: Opener) -> tuple[int, int]:
    """Return where it starts in the base and its length, bytes."""
    start = METADATA_SIZE + opener.image_stripes * opener.stripe_bytes
    return start, base.size // SECTOR_SIZE * SECTOR_SIZE - start
