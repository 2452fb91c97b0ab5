"""Refusals in words, where what is told was read from a file that anybody may have written."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions
from ublk_ubi.refusals import explain


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


def told(reason: str, asked: int | None = None, **opener) -> UbiError:
    """What a refusal says of base /b and image /i."""
    base, image = SimpleNamespace(path="/b", size=1 << 30), SimpleNamespace(path="/i", size=1 << 20)
    options = DeviceOptions(image="/i", base="/b", stripe_size=asked)
    return explain(reason, SimpleNamespace(**opener), options, image, base)
