"""The ublk kernel ABI for the control side: a ctypes mirror of `cython/ublk_ubi/ublk_abi.h`.

`tests/unit/test_abi.py` holds every field and constant against that header, and the header
against a kernel's own. Source: include/uapi/linux/ublk_cmd.h, drivers/block/ublk_drv.c.
"""

from __future__ import annotations

import ctypes
import enum

SECTOR_SHIFT = 9
SECTOR_SIZE = 1 << SECTOR_SHIFT
MAX_QUEUE_DEPTH = 4096
MAX_NR_QUEUES = 4096
FEATURES_LEN = 8
ANY_ID = 0xFFFF_FFFF
NO_QUEUE = 0xFFFF

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_s32 = ctypes.c_int32


class CtrlCmd(ctypes.Structure):
    """What a control command carries in its SQE (kernel: struct ublksrv_ctrl_cmd)."""

    _fields_ = (
        ("dev_id", _u32),
        ("queue_id", _u16),
        ("len", _u16),
        ("addr", _u64),
        ("data", _u64 * 1),
        ("dev_path_len", _u16),
        ("pad", _u16),
        ("reserved", _u32),
    )


class CtrlDevInfo(ctypes.Structure):
    """A device, as ADD_DEV and GET_DEV_INFO tell it (kernel: struct ublksrv_ctrl_dev_info)."""

    _fields_ = (
        ("nr_hw_queues", _u16),
        ("queue_depth", _u16),
        ("state", _u16),
        ("io_desc_size", _u16),
        ("max_io_buf_bytes", _u32),
        ("dev_id", _u32),
        ("ublksrv_pid", _s32),
        ("pad1", _u32),
        ("flags", _u64),
        ("ublksrv_flags", _u64),
        ("owner_uid", _u32),
        ("owner_gid", _u32),
        ("reserved1", _u64),
        ("reserved2", _u64),
    )


class ParamBasic(ctypes.Structure):
    """Block sizes as shifts, limits in 512-byte sectors (kernel: struct ublk_param_basic)."""

    _fields_ = (
        ("attrs", _u32),
        ("logical_bs_shift", _u8),
        ("physical_bs_shift", _u8),
        ("io_opt_shift", _u8),
        ("io_min_shift", _u8),
        ("max_sectors", _u32),
        ("chunk_sectors", _u32),
        ("dev_sectors", _u64),
        ("virt_boundary_mask", _u64),
    )


class ParamDiscard(ctypes.Structure):
    """Alignment and granularity in bytes, limits in sectors (kernel: struct ublk_param_discard)."""

    _fields_ = (
        ("discard_alignment", _u32),
        ("discard_granularity", _u32),
        ("max_discard_sectors", _u32),
        ("max_write_zeroes_sectors", _u32),
        ("max_discard_segments", _u16),
        ("reserved0", _u16),
    )


class ParamDevt(ctypes.Structure):
    """Device numbers, read only; the disk's are 0:0 before START_DEV."""

    _fields_ = (
        ("char_major", _u32),
        ("char_minor", _u32),
        ("disk_major", _u32),
        ("disk_minor", _u32),
    )


class ParamZoned(ctypes.Structure):
    """Zoned devices; not used here, it keeps the place."""

    _fields_ = (
        ("max_open_zones", _u32),
        ("max_active_zones", _u32),
        ("max_zone_append_sectors", _u32),
        ("reserved", _u8 * 20),
    )


class ParamDmaAlign(ctypes.Structure):
    """A mask over the address of every buffer: 4095 wants 4 KiB."""

    _fields_ = (("alignment", _u32), ("pad", _u8 * 4))


class ParamSegment(ctypes.Structure):
    """Limits of a request's segments, in bytes; none of the three may be 0 when given."""

    _fields_ = (
        ("seg_boundary_mask", _u64),
        ("max_segment_size", _u32),
        ("max_segments", _u16),
        ("pad", _u8 * 2),
    )


class ParamIntegrity(ctypes.Structure):
    """Integrity metadata; not used here, it keeps the place."""

    _fields_ = (
        ("flags", _u32),
        ("max_integrity_segments", _u16),
        ("interval_exp", _u8),
        ("metadata_size", _u8),
        ("pi_offset", _u8),
        ("csum_type", _u8),
        ("tag_size", _u8),
        ("pad", _u8 * 5),
    )


class Params(ctypes.Structure):
    """SET_PARAMS and GET_PARAMS; a kernel that knows less takes the first bytes."""

    _fields_ = (
        ("len", _u32),
        ("types", _u32),
        ("basic", ParamBasic),
        ("discard", ParamDiscard),
        ("devt", ParamDevt),
        ("zoned", ParamZoned),
        ("dma", ParamDmaAlign),
        ("seg", ParamSegment),
        ("integrity", ParamIntegrity),
    )


class Feature(enum.IntFlag):
    """What a driver can do (GET_FEATURES) and what a device was granted (ADD_DEV)."""

    SUPPORT_ZERO_COPY = 1 << 0
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20


ZERO_COPY = Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY | Feature.AUTO_BUF_REG
"""What the zero-copy data path takes."""


class DevState(enum.IntEnum):
    """The driver's view of a device."""

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAIL_IO = 3


class Attr(enum.IntFlag):
    """Attributes of the disk: `ParamBasic.attrs`."""

    READ_ONLY = 1 << 0
    ROTATIONAL = 1 << 1
    VOLATILE_CACHE = 1 << 2
    FUA = 1 << 3


class ParamType(enum.IntFlag):
    """Which parts of `Params` are filled in: `Params.types`."""

    BASIC = 1 << 0
    DISCARD = 1 << 1
    DEVT = 1 << 2
    ZONED = 1 << 3
    DMA_ALIGN = 1 << 4
    SEGMENT = 1 << 5
    INTEGRITY = 1 << 6


def _ior(number: int) -> int:
    """_IOR('u', number, struct ublksrv_ctrl_cmd) of asm-generic/ioctl.h."""
    return 2 << 30 | ctypes.sizeof(CtrlCmd) << 16 | ord("u") << 8 | number


def _iowr(number: int) -> int:
    """_IOWR('u', number, struct ublksrv_ctrl_cmd) of asm-generic/ioctl.h."""
    return 1 << 30 | _ior(number)


class Command(enum.IntEnum):
    """The control commands, ioctl-encoded (kernels ≥ 6.4)."""

    GET_QUEUE_AFFINITY = _ior(0x01)
    GET_DEV_INFO = _ior(0x02)
    ADD_DEV = _iowr(0x04)
    DEL_DEV = _iowr(0x05)
    START_DEV = _iowr(0x06)
    STOP_DEV = _iowr(0x07)
    SET_PARAMS = _iowr(0x08)
    GET_PARAMS = _ior(0x09)
    START_USER_RECOVERY = _iowr(0x10)
    END_USER_RECOVERY = _iowr(0x11)
    GET_DEV_INFO2 = _ior(0x12)
    GET_FEATURES = _ior(0x13)
    DEL_DEV_ASYNC = _ior(0x14)
    UPDATE_SIZE = _iowr(0x15)
    QUIESCE_DEV = _iowr(0x16)
    TRY_STOP_DEV = _iowr(0x17)
