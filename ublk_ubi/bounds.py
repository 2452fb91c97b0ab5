"""What image, base and format must be to one another: sizes, stripes, block sizes.

Bounds of the on-disk format: stripes are a power of two from 64 KiB to 1 MiB; an image has at
most 2,097,152 of them; a base holds 8 MiB of metadata and then the image, rounded up to a stripe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import Exit, UbiError
from .files import SECTOR_SIZE, shown, size_text
from .options import MAX_STRIPE_SIZE, MAX_STRIPES, METADATA_SIZE, MIN_STRIPE_SIZE

if TYPE_CHECKING:
    from .base import Base
    from .image import Image

_MAX_BLOCK_SIZE = 4096


def check_bounds(
    base_size: int,
    image_size: int,
    stripe_size: int,
    *,
    base: str = "the base",
    image: str = "the image",
) -> int:
    """Return the image's number of stripes when it fits the format and the base; sizes in bytes.

    Raises UbiError: the stripe size is no power of two from 64 KiB to 1 MiB (USAGE), the image
    has more than 2,097,152 stripes, or the base is smaller than 8 MiB and the image rounded up to
    a stripe. `base` and `image` are how the messages call them, such as "base /srv/a".
    """
    assert image_size > 0
    valid = MIN_STRIPE_SIZE <= stripe_size <= MAX_STRIPE_SIZE
    if not valid or stripe_size & (stripe_size - 1):
        raise UbiError(
            f"stripe size {stripe_size} is out of range: use 64K, 128K, 256K, 512K or 1M",
            Exit.USAGE,
        )
    stripes = -(-image_size // stripe_size)
    if stripes > MAX_STRIPES:
        raise _too_many_stripes(image, image_size, stripe_size)
    needed = METADATA_SIZE + stripes * stripe_size
    if base_size < needed:
        smaller = stripe_size > MIN_STRIPE_SIZE and _needed(image_size) <= base_size
        raise UbiError(
            _shortage(base, base_size, image, image_size, needed)
            + ("name a larger base, or use a smaller --stripe-size" if smaller
               else "name a larger base"),
        )
    return stripes


def refuse_too_small(
    base: str, base_size: int, image: str, image_size: int, *, way_out: str,
) -> None:
    """Refuse what is too small whatever the stripe size; `check_bounds` is exact, later."""
    if base_size < _needed(image_size):
        raise UbiError(_shortage(base, base_size, image, image_size, _needed(image_size)) + way_out)


def other_image_size(base: str, recorded: int, image: str, image_size: int) -> UbiError:
    """Say that an image cannot be the one that a base was made from; sizes in bytes."""
    return UbiError(
        f"{base} belongs to an image of {size_text(recorded)}, and {image} has "
        f"{size_text(image_size)}: give the image it was made from (none, if the base has all of "
        "it), or start anew with --format",
    )


def required_block_size(image: Image | None, base: Base) -> int:
    """Return the device's smallest logical block size in bytes, 512 or 4096.

    It is what direct I/O on image and base takes. Raises UbiError when that is more than 4096.
    """
    files = [("base", base.path, base.alignment, "name a base on another filesystem")]
    if image is not None:
        files.append(("image", image.path, image.alignment, "use --image-cache page"))
    for what, path, alignment, way_out in files:
        if alignment > _MAX_BLOCK_SIZE:
            raise UbiError(
                f"{what} {shown(path)} takes direct I/O in units of {alignment} bytes only, a "
                f"disk's blocks have at most {_MAX_BLOCK_SIZE}: {way_out}",
            )
    largest = max(alignment for _, _, alignment, _ in files)
    return _MAX_BLOCK_SIZE if largest > SECTOR_SIZE else SECTOR_SIZE


def block_size(asked: int | None, image: Image | None, base: Base) -> int:
    """Return the device's logical block size in bytes: the one `asked` for, or the smallest.

    Raises UbiError when what was asked for is smaller than that.
    """
    needed = required_block_size(image, base)
    if asked is None or asked >= needed:
        return asked or needed
    if base.alignment > asked or image is None:
        what, way_out = f"base {shown(base.path)}", ""
    else:
        what, way_out = f"image {shown(image.path)}", ", or use --image-cache page"
    raise UbiError(
        f"--block-size {asked} is smaller than the {needed} bytes that {what} takes in direct I/O: "
        f"drop --block-size{way_out}",
    )


def _needed(image_size: int) -> int:
    """Return the bytes that a base needs with the smallest stripes."""
    return METADATA_SIZE + -(-image_size // MIN_STRIPE_SIZE) * MIN_STRIPE_SIZE


def _shortage(base: str, base_size: int, image: str, image_size: int, needed: int) -> str:
    return (
        f"{base} is too small with {size_text(base_size)}, it needs {size_text(needed)}: 8 MiB of "
        f"metadata, and {image} of {size_text(image_size)} in whole stripes; "
    )


def _too_many_stripes(image: str, image_size: int, stripe_size: int) -> UbiError:
    """Name the stripe size that would do, if one does."""
    fitting = stripe_size
    while fitting <= MAX_STRIPE_SIZE and -(-image_size // fitting) > MAX_STRIPES:
        fitting *= 2
    if fitting > MAX_STRIPE_SIZE:
        way_out = f"an image may have at most {size_text(MAX_STRIPES * MAX_STRIPE_SIZE)}"
    elif fitting == MAX_STRIPE_SIZE:
        way_out = "use --stripe-size 1M"
    else:
        way_out = f"use --stripe-size {fitting >> 10}K or larger"
    return UbiError(
        f"{image} of {size_text(image_size)} has {-(-image_size // stripe_size)} stripes of "
        f"{stripe_size} bytes, {MAX_STRIPES} are possible: {way_out}",
    )
