"""Device parameters: into the kernel's layout and back, and what is refused beforehand."""

from __future__ import annotations

import mmap

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_ubi import abi
from ublk_ubi.abi import Attr, ParamType
from ublk_ubi.device_params import DeviceParams, DiscardLimits
from ublk_ubi.errors import UbiError

PLAIN = DeviceParams(dev_sectors=1 << 21, max_sectors=2048)


def packed(**changes):
    return abi.Params.from_buffer_copy(msgspec.structs.replace(PLAIN, **changes).pack())


def test_the_least_is_a_disk_of_512_byte_blocks():
    params = packed()
    assert (params.len, params.types) == (152, int(ParamType.BASIC))
    basic = params.basic
    assert (basic.logical_bs_shift, basic.physical_bs_shift) == (9, 12)
    assert (basic.io_min_shift, basic.io_opt_shift, basic.attrs) == (9, 9, 0)
    assert (basic.dev_sectors, basic.max_sectors, basic.chunk_sectors) == (1 << 21, 2048, 0)
    assert basic.virt_boundary_mask == 0


@pytest.mark.parametrize(
    ("field", "attr"),
    [
        ("volatile_cache", Attr.VOLATILE_CACHE),
        ("fua", Attr.FUA),
        ("read_only", Attr.READ_ONLY),
        ("rotational", Attr.ROTATIONAL),
    ],
)
def test_attributes(field, attr):
    assert packed(**{field: True}).basic.attrs == int(attr)


def test_discard_has_one_segment():
    limits = DiscardLimits(
        granularity=1 << 20, max_discard_sectors=1 << 22, max_write_zeroes_sectors=2048,
    )
    params = packed(discard=limits)
    assert params.types == int(ParamType.BASIC | ParamType.DISCARD)
    assert params.discard.max_discard_segments == 1
    assert params.discard.discard_granularity == 1 << 20


def test_dma_alignment_is_a_mask():
    params = packed(dma_alignment=512)
    assert params.types == int(ParamType.BASIC | ParamType.DMA_ALIGN)
    assert params.dma.alignment == 511


def test_segments_may_be_as_long_as_a_request_and_cross_no_boundary_that_matters():
    params = packed(max_segments=257)
    assert params.types == int(ParamType.BASIC | ParamType.SEGMENT)
    assert params.seg.max_segments == 257
    assert params.seg.max_segment_size == params.basic.max_sectors * 512
    assert params.seg.seg_boundary_mask == (1 << 32) - 1


blocks = st.sampled_from([512, 1024, 4096])


@given(
    st.builds(
        DeviceParams,
        dev_sectors=st.integers(1, 1 << 40).map(lambda n: n * 8),
        max_sectors=st.integers(8, 65536),
        chunk_sectors=st.integers(0, 1 << 20),
        logical_block_size=blocks,
        physical_block_size=st.sampled_from([4096, 65536]),
        io_min=blocks,
        io_opt=st.sampled_from([512, 1 << 20, 1 << 28]),
        volatile_cache=st.booleans(),
        fua=st.booleans(),
        read_only=st.booleans(),
        rotational=st.booleans(),
        discard=st.none() | st.builds(
            DiscardLimits,
            granularity=st.integers(1, 1 << 31),
            alignment=st.integers(0, 1 << 31),
            max_discard_sectors=st.integers(0, (1 << 32) - 1),
            max_write_zeroes_sectors=st.integers(0, (1 << 32) - 1),
        ),
        dma_alignment=st.none() | st.sampled_from([1, 4, 512, 4096]),
        max_segments=st.none() | st.integers(1, 65535),
    ),
)
def test_what_is_packed_is_unpacked(params):
    assert DeviceParams.unpack(params.pack()) == params


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logical_block_size": 1000}, r"logical block size 1000 is not a power of two"),
        ({"logical_block_size": 256}, r"logical block size 256 is not"),
        ({"logical_block_size": 0}, r"logical block size 0 is not"),
        ({"physical_block_size": 512 << 20}, r"physical block size 536870912 is not"),
        ({"logical_block_size": 4096, "physical_block_size": 512}, r"512 is smaller than.*4096"),
        ({"dev_sectors": 0}, r"device size 0 is not a multiple"),
        ({"dev_sectors": 9, "logical_block_size": 4096}, r"4608 is not a multiple of.*4096"),
        ({"max_sectors": 1}, r"max_sectors 1 is less than a page"),
        ({"io_opt": 3}, r"io_opt 3 is not a power of two"),
        ({"dma_alignment": 3}, r"DMA alignment 3 is not a power of two"),
        ({"dma_alignment": 2 * mmap.PAGESIZE}, r"DMA alignment \d+ is not"),
        (
            {"discard": DiscardLimits(
                granularity=0, max_discard_sectors=1, max_write_zeroes_sectors=1,
            )},
            r"granularity 0 is not above 0",
        ),
    ],
)
def test_what_the_driver_would_refuse_is_named_before(changes, says):
    with pytest.raises(UbiError, match=says) as caught:
        packed(**changes)
    assert "\n" not in caught.value.message
