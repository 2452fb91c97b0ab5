"""Bounds of image, base and format: each limit, and one past it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ublk_ubi.bounds import block_size, check_bounds, refuse_too_small, required_block_size
from ublk_ubi.errors import Exit, UbiError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
STRIPE_SIZES = [64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB]


def refused(*arguments, code: Exit = Exit.FAILED, **names) -> str:
    with pytest.raises(UbiError) as caught:
        check_bounds(*arguments, **names)
    assert caught.value.code == code
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


@pytest.mark.parametrize("stripe_size", STRIPE_SIZES)
def test_the_base_holds_the_image_in_whole_stripes(stripe_size: int):
    for image_size, stripes in ((1, 1), (stripe_size, 1), (stripe_size + 1, 2), (GIB, None)):
        count = stripes or GIB // stripe_size
        needed = 8 * MIB + count * stripe_size
        assert check_bounds(needed, image_size, stripe_size) == count
        assert check_bounds(needed + 12345, image_size, stripe_size) == count
        message = refused(needed - 1, image_size, stripe_size, base="base /b", image="image /i")
        for part in ("base /b", "image /i", str(needed), str(needed - 1), "larger base"):
            assert part in message


def test_a_smaller_stripe_size_is_offered_only_where_it_helps():
    base_size = 8 * MIB + 64 * KIB
    assert "--stripe-size" in refused(base_size, 1, MIB)
    assert check_bounds(base_size, 1, 64 * KIB) == 1
    assert "--stripe-size" not in refused(base_size - 1, 1, MIB)
    assert "--stripe-size" not in refused(base_size - 1, 1, 64 * KIB)


@pytest.mark.parametrize("stripe_size", [0, -1, 1, 4096, 32 * KIB, 64 * KIB - 1, 64 * KIB + 512,
                                         96 * KIB, MIB - 1, MIB + 1, 2 * MIB, 1 << 63])
def test_a_stripe_size_out_of_range(stripe_size: int):
    message = refused(TIB, GIB, stripe_size, code=Exit.USAGE)
    assert f"stripe size {stripe_size} " in message
    assert "64K" in message
    assert "1M" in message


@pytest.mark.parametrize("stripe_size", STRIPE_SIZES)
def test_too_many_stripes(stripe_size: int):
    most = 2_097_152 * stripe_size
    assert check_bounds(1 << 62, most, stripe_size) == 2_097_152
    message = refused(1 << 62, most + 1, stripe_size, image="image /i")
    assert "image /i" in message
    assert "2097153 stripes" in message
    assert "2097152 are possible" in message
    if stripe_size == MIB:
        assert "at most 2199023255552 bytes (2 TiB)" in message
    else:
        advised = stripe_size * 2
        assert ("--stripe-size 1M" if advised == MIB else f"{advised >> 10}K") in message
        assert check_bounds(1 << 62, most + 1, advised)


def test_the_stripe_size_offered_fits_at_once():
    assert "--stripe-size 512K or larger" in refused(1 << 62, TIB, 64 * KIB)
    assert "at most" in refused(1 << 62, 3 * TIB, 64 * KIB)


def test_too_small_whatever_the_stripe_size():
    refuse_too_small("base /b", 8 * MIB + 64 * KIB, "image /i", 1, way_out="x")
    with pytest.raises(UbiError, match=r"^base /b is too small .*image /i.*; grow it$"):
        refuse_too_small("base /b", 8 * MIB + 64 * KIB - 1, "image /i", 1, way_out="grow it")


@pytest.mark.parametrize(
    ("image", "base", "block_size"),
    [(1, 1, 512), (512, 512, 512), (512, 4096, 4096), (4096, 1, 4096), (1024, 512, 4096)],
)
def test_the_block_size_that_direct_io_takes(image: int, base: int, block_size: int):
    assert required_block_size(
        SimpleNamespace(path="/i", alignment=image), SimpleNamespace(path="/b", alignment=base),
    ) == block_size


def test_blocks_too_large_for_a_disk():
    small, large = (SimpleNamespace(path=f"/{n}", alignment=n) for n in (512, 8192))
    with pytest.raises(UbiError, match=r"^image /8192 .* 8192 bytes .*--image-cache page"):
        required_block_size(large, small)
    with pytest.raises(UbiError, match=r"^base /8192 .* 8192 bytes .*another filesystem"):
        required_block_size(small, large)


def test_the_block_size_that_is_asked_for():
    """What was too small for image or base was not said to be so for either."""
    small, large = (SimpleNamespace(path=f"/{n}", alignment=n) for n in (512, 4096))
    assert block_size(None, small, small) == block_size(512, None, small) == 512
    assert block_size(None, large, small) == block_size(4096, small, small) == 4096
    with pytest.raises(UbiError, match=r"^--block-size 512 .* 4096 bytes that image /4096 .*page$"):
        block_size(512, large, small)
    for image in (None, small, large):
        with pytest.raises(UbiError, match=r"that base /4096 .* drop --block-size$"):
            block_size(512, image, large)
