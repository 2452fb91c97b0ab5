"""Why a base cannot be opened, in one line each: what, which value, and the way out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ublk_ubi.bounds import check_bounds, other_image_size
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.files import shown, size_text, uuid_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi._opener import Opener
    from ublk_ubi.base import Base
    from ublk_ubi.image import Image
    from ublk_ubi.options import DeviceOptions

AFTER_POWER_LOSS = (
    "--force-stale goes on with what the base alone proves, as after a power loss, and without the "
    "record of writes, which stays where it is another base's"
)


def _error_text(number: int) -> str:
    """Name an errno that was read somewhere, and may be no such number."""
    return os.strerror(number) if number < 1 << 31 else f"error {number}"


class Context:
    """What the messages speak of."""

    def __init__(self, opener: Opener, options: DeviceOptions, image: Image | None,
                 base: Base) -> None:
        self.opener = opener
        self.base = base
        self.image = image
        self.options = options
        self.what = f"base {shown(base.path)}"

    @property
    def image_path(self) -> str:
        """How to call the image."""
        return shown(self.image.path) if self.image is not None else "none"

    @property
    def image_size(self) -> int:
        """Its bytes; without one, those of the image that the base records."""
        return self.image.size if self.image is not None else self.opener.recorded_image_bytes

    def asked(self) -> str:
        """Tell the stripe size that was asked for."""
        return size_text(self.options.stripe_size or 0)

    def recorded(self) -> str:
        """Tell the stripe size that the base records."""
        return size_text(self.opener.stripe_bytes)


def _bounds(context: Context) -> UbiError:
    """Let the one place that knows the bounds find the words."""
    try:
        check_bounds(
            context.base.size, context.image_size, context.opener.stripe_bytes,
            base=f"base {shown(context.base.path)}", image=f"image {context.image_path}",
        )
    except UbiError as error:
        return error
    return UbiError(f"{context.what} cannot have stripes of {context.recorded()}")


def _stripe_range(context: Context) -> UbiError:
    """Tell whose stripe size it is: the user's, or what the base records."""
    if context.options.stripe_size == context.opener.stripe_bytes:
        return _bounds(context)
    return UbiError(
        f"{context.what} records stripes of {context.recorded()}, which no disk here can have "
        "(64K to 1M, a power of two): restore it from a backup, or start anew with --format",
    )


_LINES: dict[str, Callable[[Context], UbiError]] = {
    "foreign": lambda c: UbiError(
        f"{c.what} is not empty and not a disk of ours: look with `ublk-ubi inspect "
        f"{shown(c.base.path)}`; --format overwrites it",
    ),
    "version": lambda c: UbiError(
        f"{c.what} has metadata of an unknown version: use the release that made it, or --format",
    ),
    "damaged": lambda c: UbiError(
        f"{c.what} has damaged metadata (both slots of the extension, or sizes that contradict "
        f"each other): see `ublk-ubi inspect {shown(c.base.path)}`, restore it from a "
        "backup, or start anew with --format",
    ),
    "newer": lambda c: UbiError(
        f"{c.what} was written by a newer ublk-ubi: upgrade this one",
    ),
    "adopt": lambda c: UbiError(
        f"{c.what} is a disk of bdev_ubi's: end its user first, then add it with --adopt",
    ),
    "stripe_unknown": lambda c: UbiError(
        f"{c.what} is a disk of bdev_ubi's that does not record its stripe size: give the one it "
        "was made with, --stripe-size 256K, 512K or 1M",
    ),
    "stripe_size": lambda c: UbiError(
        f"{c.what} has stripes of {c.recorded()}, not of {c.asked()}: drop --stripe-size, or "
        "start anew with --format",
    ),
    "stripe_range": _stripe_range,
    "too_many_stripes": _bounds,
    "too_small": _bounds,
    "image_size": lambda c: other_image_size(
        c.what, c.opener.recorded_image_bytes, c.image_path, c.image_size,
    ),
    "fingerprint": lambda c: UbiError(
        f"{c.what} was made from another image than {c.image_path} (same size, other "
        "content): give that image (none, if the base has all of it); --force takes this one for "
        "the stripes not hydrated yet",
    ),
    "live": lambda c: UbiError(
        f"{c.what} is a copy of a disk (UUID {uuid_text(c.opener.uuid)}) that is in use now: "
        "end that device first",
        Exit.BUSY,
    ),
    "copy": lambda c: UbiError(
        f"{c.what} does not fit the record of writes that a daemon left for UUID "
        f"{uuid_text(c.opener.uuid)}: it is a copy of that disk, or an older one; add the "
        f"original, or {AFTER_POWER_LOSS}",
    ),
    "stale": lambda c: UbiError(
        f"{c.what} was in use since this boot and its record of writes is gone: acknowledged "
        f"writes may be lost, or it is a copy of a disk in use; {AFTER_POWER_LOSS}",
    ),
    "latched": lambda c: UbiError(
        f"{c.what} failed to make writes durable ({_error_text(c.opener.latch)}) and may have lost "
        f"some: check its disk (see `dmesg`); then {AFTER_POWER_LOSS}",
        Exit.DEGRADED,
    ),
    "foreign_writer": lambda c: UbiError(
        f"{c.what} was written by another program while its daemon was down: find out which; "
        f"{AFTER_POWER_LOSS}",
    ),
    "needs_image": lambda c: UbiError(
        f"{c.what} does not have all of its image yet: give the image it was made from, --image",
    ),
}


def explain(
    reason: str, opener: Opener, options: DeviceOptions, image: Image | None, base: Base,
) -> UbiError:
    """Return the error for a refusal of the lifecycle engine."""
    return _LINES[reason](Context(opener, options, image, base))


def not_yet_forced(base: Base) -> str:
    """Warn that a base which goes on with its table records another image only when next opened."""
    return (f"base {shown(base.path)} still records the image that it was made from, as it was not "
            "closed: after a clean stop give --force once more")
