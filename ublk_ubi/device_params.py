"""What a ublk device is asked to be and what it turned out to be, in plain values.

Sizes are bytes unless the name says sectors (512 bytes). `abi` has the kernel's own layout.
"""

from __future__ import annotations

import ctypes
import mmap

import msgspec

from ublk_ubi import abi
from ublk_ubi.abi import SECTOR_SIZE, Attr, DevState, Feature, ParamType
from ublk_ubi.errors import UbiError

SEGMENT_BOUNDARY = 1 << 32
MAX_BLOCK_SHIFT = 28
"""The driver takes a physical block, io_min and io_opt of at most 256 MiB."""


class AddParams(msgspec.Struct, frozen=True, kw_only=True):
    """What ADD_DEV is asked for; `id` None lets the kernel choose."""

    queues: int = 1
    depth: int = 128
    max_io_bytes: int = 1 << 20
    flags: Feature = Feature(0)
    id: int | None = None
    server_flags: int = 0
    """64 bits that the driver stores for the server and never looks at."""

    def pack(self) -> bytes:
        """Return a struct ublksrv_ctrl_dev_info."""
        return bytes(
            abi.CtrlDevInfo(
                nr_hw_queues=self.queues,
                queue_depth=self.depth,
                max_io_buf_bytes=self.max_io_bytes,
                dev_id=abi.ANY_ID if self.id is None else self.id,
                ublksrv_pid=-1,
                flags=int(self.flags),
                ublksrv_flags=self.server_flags,
            ),
        )


class DevInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the driver tells it: granted flags and queues, not the wanted ones."""

    id: int
    state: DevState
    queues: int
    depth: int
    max_io_bytes: int
    flags: Feature
    server_flags: int
    pid: int | None
    """The server's process id, None when the driver knows of none that lives."""
    owner_uid: int
    owner_gid: int

    @classmethod
    def unpack(cls, data: bytes) -> DevInfo:
        """Read a struct ublksrv_ctrl_dev_info; raises UbiError on a state that is not known."""
        raw = abi.CtrlDevInfo.from_buffer_copy(data)
        try:
            state = DevState(raw.state)
        except ValueError:
            raise UbiError(
                f"ublk device {raw.dev_id} is in the unknown state {raw.state}: "
                "this kernel is newer than this program; upgrade ublk-ubi",
            ) from None
        return cls(
            id=raw.dev_id,
            state=state,
            queues=raw.nr_hw_queues,
            depth=raw.queue_depth,
            max_io_bytes=raw.max_io_buf_bytes,
            flags=Feature(raw.flags),
            server_flags=raw.ublksrv_flags,
            pid=raw.ublksrv_pid if raw.ublksrv_pid > 0 else None,
            owner_uid=raw.owner_uid,
            owner_gid=raw.owner_gid,
        )

    @property
    def char_path(self) -> str:
        """Where the server takes requests from."""
        return f"/dev/ublkc{self.id}"

    @property
    def disk_path(self) -> str:
        """Where the disk appears once it is started."""
        return f"/dev/ublkb{self.id}"


class DevNumbers(msgspec.Struct, frozen=True):
    """Major and minor of ublkcN, and of ublkbN once it is started."""

    char: tuple[int, int]
    disk: tuple[int, int] | None


class DiscardLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Discard and write-zeroes; without them the disk knows neither.

    A discard is not cut at `DeviceParams.chunk_sectors`, READ, WRITE and WRITE_ZEROES are.
    """

    granularity: int
    alignment: int = 0
    max_discard_sectors: int
    max_write_zeroes_sectors: int


class DeviceParams(msgspec.Struct, frozen=True, kw_only=True):
    """The disk's parameters, set between ADD_DEV and START_DEV.

    `io_opt` and `io_min` 0 mean the logical block size. `dma_alignment` 4096 wants every buffer at
    a multiple of 4 KiB; None leaves the kernel's 4 bytes. `max_segments` is how many pieces of
    memory a request may have; None leaves the block layer's 128, all that there is before 6.15.
    """

    dev_sectors: int
    max_sectors: int
    chunk_sectors: int = 0
    logical_block_size: int = 512
    physical_block_size: int = 4096
    io_min: int = 0
    io_opt: int = 0
    volatile_cache: bool = False
    fua: bool = False
    read_only: bool = False
    rotational: bool = False
    discard: DiscardLimits | None = None
    dma_alignment: int | None = None
    max_segments: int | None = None

    def pack(self) -> bytes:
        """Return a struct ublk_params.

        Raises UbiError on what the driver would refuse with a bare EINVAL (ublk_validate_params
        in drivers/block/ublk_drv.c), or take and then fail to start (blk_validate_limits).
        """
        logical = _shift("logical block size", self.logical_block_size)
        physical = _shift("physical block size", self.physical_block_size)
        if logical > physical:
            raise UbiError(
                f"physical block size {self.physical_block_size} is smaller than "
                f"logical block size {self.logical_block_size}",
            )
        self._check_limits()
        params = abi.Params(len=ctypes.sizeof(abi.Params), types=int(ParamType.BASIC))
        params.basic = abi.ParamBasic(
            attrs=int(self._attrs()),
            logical_bs_shift=logical,
            physical_bs_shift=physical,
            io_min_shift=_shift("io_min", self.io_min or self.logical_block_size),
            io_opt_shift=_shift("io_opt", self.io_opt or self.logical_block_size),
            max_sectors=self.max_sectors,
            chunk_sectors=self.chunk_sectors,
            dev_sectors=self.dev_sectors,
        )
        if self.discard is not None:
            params.types |= int(ParamType.DISCARD)
            params.discard = abi.ParamDiscard(
                discard_alignment=self.discard.alignment,
                discard_granularity=self.discard.granularity,
                max_discard_sectors=self.discard.max_discard_sectors,
                max_write_zeroes_sectors=self.discard.max_write_zeroes_sectors,
                max_discard_segments=1,
            )
        if self.dma_alignment is not None:
            params.types |= int(ParamType.DMA_ALIGN)
            params.dma = abi.ParamDmaAlign(alignment=self.dma_alignment - 1)
        if self.max_segments is not None:
            params.types |= int(ParamType.SEGMENT)
            params.seg = abi.ParamSegment(
                seg_boundary_mask=SEGMENT_BOUNDARY - 1,
                max_segment_size=self.max_sectors * SECTOR_SIZE,
                max_segments=self.max_segments,
            )
        return bytes(params)

    def _check_limits(self) -> None:
        size = self.dev_sectors * SECTOR_SIZE
        if size <= 0 or size % self.logical_block_size:
            raise UbiError(
                f"device size {size} is not a multiple of the block size {self.logical_block_size}",
            )
        if self.max_sectors * SECTOR_SIZE < mmap.PAGESIZE:
            raise UbiError(f"max_sectors {self.max_sectors} is less than a page")
        if self.discard is not None and self.discard.granularity <= 0:
            raise UbiError(f"discard granularity {self.discard.granularity} is not above 0")
        alignment = self.dma_alignment
        if alignment is not None and not (
            0 < alignment <= mmap.PAGESIZE and alignment & (alignment - 1) == 0
        ):
            raise UbiError(f"DMA alignment {alignment} is not a power of two of at most a page")

    @classmethod
    def unpack(cls, data: bytes) -> DeviceParams:
        """Read a struct ublk_params."""
        params = abi.Params.from_buffer_copy(data)
        basic, types = params.basic, ParamType(params.types)
        attrs = Attr(basic.attrs)
        discard = None
        if ParamType.DISCARD in types:
            discard = DiscardLimits(
                granularity=params.discard.discard_granularity,
                alignment=params.discard.discard_alignment,
                max_discard_sectors=params.discard.max_discard_sectors,
                max_write_zeroes_sectors=params.discard.max_write_zeroes_sectors,
            )
        return cls(
            dev_sectors=basic.dev_sectors,
            max_sectors=basic.max_sectors,
            chunk_sectors=basic.chunk_sectors,
            logical_block_size=1 << basic.logical_bs_shift,
            physical_block_size=1 << basic.physical_bs_shift,
            io_min=1 << basic.io_min_shift,
            io_opt=1 << basic.io_opt_shift,
            volatile_cache=Attr.VOLATILE_CACHE in attrs,
            fua=Attr.FUA in attrs,
            read_only=Attr.READ_ONLY in attrs,
            rotational=Attr.ROTATIONAL in attrs,
            discard=discard,
            dma_alignment=params.dma.alignment + 1 if ParamType.DMA_ALIGN in types else None,
            max_segments=params.seg.max_segments if ParamType.SEGMENT in types else None,
        )

    def _attrs(self) -> Attr:
        attrs = Attr(0)
        for wanted, attr in (
            (self.volatile_cache, Attr.VOLATILE_CACHE),
            (self.fua, Attr.FUA),
            (self.read_only, Attr.READ_ONLY),
            (self.rotational, Attr.ROTATIONAL),
        ):
            if wanted:
                attrs |= attr
        return attrs


def dev_numbers(data: bytes) -> DevNumbers:
    """Read the device numbers out of a struct ublk_params that GET_PARAMS filled."""
    devt = abi.Params.from_buffer_copy(data).devt
    disk = (devt.disk_major, devt.disk_minor)
    return DevNumbers(
        char=(devt.char_major, devt.char_minor),
        disk=disk if disk != (0, 0) else None,
    )


def _shift(what: str, size: int) -> int:
    shift = size.bit_length() - 1
    if size != 1 << max(shift, 0) or not abi.SECTOR_SHIFT <= shift <= MAX_BLOCK_SHIFT:
        raise UbiError(f"{what} {size} is not a power of two between 512 bytes and 256 MiB")
    return shift
