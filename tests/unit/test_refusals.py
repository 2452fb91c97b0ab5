"""Refusals in words, where what is told was read from a file that anybody may have written."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import handmade
import pytest

from ublk_ubi.base import open_base
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.image import open_image
from ublk_ubi.options import DeviceOptions
from ublk_ubi.refusals import explain

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.mark.parametrize(("latch", "words"), [
    (errno.EIO, "(Input/output error)"), (4096, "(Unknown error 4096)"),
    ((1 << 32) - 1, "(error 4294967295)"),
])
def test_a_latch_that_is_no_errno(latch: int, words: str) -> None:
    """It was an OverflowError: the latch is outside of a table's checksum."""
    error = told("latched", latch=latch)
    assert words in error.message
    assert error.code == Exit.DEGRADED


@pytest.mark.parametrize("recorded", [0, 65 << 10, 2 << 20])
def test_a_stripe_size_that_the_base_records(recorded: int) -> None:
    """It was told as if the user had asked for it, and the base was not named."""
    error = told("stripe_range", stripe_bytes=recorded)
    assert error.message.startswith("base /b records stripes of ")
    assert error.code == Exit.FAILED


def test_a_stripe_size_that_the_user_asks_for() -> None:
    error = told("stripe_range", 4096, stripe_bytes=4096)
    assert "stripe size 4096 is out of range" in error.message
    assert error.code == Exit.USAGE


def test_a_disk_that_is_given_a_larger_image_is_not_to_be_removed(tmp_path: Path) -> None:
    """It was told to be too small a base, and to remove it: a tenant's disk."""
    for recorded, words in (
        (2 * MIB, "belongs to an image of 2097152 bytes (2 MiB)"),  # the image has grown
        (3 * MIB, "is too small"),                                  # the base was cut off
    ):
        message = too_small(tmp_path, bytes(handmade.disk(handmade.slot(image_size=recorded))))
        assert words in message
        assert "remove" not in message
    assert "remove" not in too_small(tmp_path, b"somebody's file")
    assert "or remove " in too_small(tmp_path, b"")


def test_a_disk_that_is_made_anew_has_no_image(tmp_path: Path) -> None:
    data = bytes(handmade.disk(handmade.slot(image_size=2 * MIB)))
    assert "is too small" in too_small(tmp_path, data, anew=True)


def too_small(place: Path, content: bytes, **options: bool) -> str:
    """What is said of a base of that content, and of 10 MiB, and an image of 3 MiB."""
    (place / "base").write_bytes(content)
    os.truncate(place / "base", 10 * MIB)
    (place / "image").write_bytes(b"i" * 3 * MIB)
    with open_image(str(place / "image")) as image, pytest.raises(UbiError) as caught:
        open_base(
            str(place / "base"), image=image, size=None, create_data_size=3 * MIB,
            fence_timeout_s=1, **options,
        )
    assert (place / "base").read_bytes().rstrip(b"\0") == content.rstrip(b"\0")
    return caught.value.message


def told(reason: str, asked: int | None = None, **opener) -> UbiError:
    """What a refusal says of base /b and image /i."""
    base, image = SimpleNamespace(path="/b", size=1 << 30), SimpleNamespace(path="/i", size=1 << 20)
    options = DeviceOptions(image="/i", base="/b", stripe_size=asked)
    return explain(reason, SimpleNamespace(**opener), options, image, base)
