"""Sizes: what is taken, what is refused and with which words, and what comes out."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.sizes import MAX_SIZE, format_size, human_size, parse_size

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("1M", 1 << 20),
        ("5G", 5 * GIB),
        ("5 G", 5 * GIB),
        ("5Gi", 5 * GIB),
        ("5GiB", 5 * GIB),
        ("5gib", 5 * GIB),
        (" 5G\n", 5 * GIB),
        ("+5G", 5 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("1.50G", 3 * GIB // 2),
        ("0.5K", 512),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("9223372036854775807", MAX_SIZE),
    ],
)
def test_taken(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a size"),
        (" ", "not a size"),
        ("G", "not a size"),
        (".5G", "not a size"),
        ("5.", "not a size"),
        ("5,5G", "not a size"),
        ("1e3", "not a size"),
        ("0x10", "not a size"),
        ("1_000", "not a size"),
        ("5G5", "not a size"),
        ("٥G", "not a size"),
        ("5G\0", "not a size"),
        ("--5G", "not a size"),
        ("-5G", "is negative"),
        ("-0", "is negative"),
        ("5GB", "write 5G for 5 GiB"),
        ("5gb", "write 5G for 5 GiB"),
        ("1.5kB", "write 1.5K for 1.5 KiB"),
        ("5X", "unknown unit 'X'"),
        ("5GBit", "unknown unit"),
        ("5BiB", "unknown unit"),
        ("1.5", "write 1 or 2"),
        ("1.3G", "write 1395864371 or 1395864372"),
        ("8E", "too large"),
        ("9223372036854775808", "too large"),
        ("9" * 39, "too large"),
        ("9" * 100_000, "not a size"),
    ],
)
def test_refused_as_wrong_usage_with_the_value(text: str, words: str) -> None:
    with pytest.raises(UbiError) as caught:
        parse_size(text)
    assert words in caught.value.message
    assert repr(text)[:30] in caught.value.message
    assert len(caught.value.message) < 200
    assert caught.value.code == Exit.USAGE


@settings(deadline=None)
@given(st.integers(0, MAX_SIZE))
def test_format_is_exact(size: int) -> None:
    assert parse_size(format_size(size)) == size


@settings(deadline=None)
@given(st.text(max_size=50))
def test_never_another_error(text: str) -> None:
    with contextlib.suppress(UbiError):
        assert 0 <= parse_size(text) <= MAX_SIZE


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1023, "1023"), (64 << 10, "64K"), (5 * GIB, "5G"), (3 * GIB // 2, "1536M")],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2361393152, "2.2 GiB"),
        (5 * GIB, "5 GiB"),
        ((1 << 20) - 1, "1 MiB"),
        (150 << 30, "150 GiB"),
        (MAX_SIZE, "8 EiB"),
    ],
)
def test_human(size: int, text: str) -> None:
    assert human_size(size) == text
