"""What a guest does with a disk, one request at a time, past every cache."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device

BLOCK = 4096


def read(device: Device, offset: int, length: int = BLOCK) -> bytes:
    with device.open(os.O_RDONLY) as disk:
        return disk.pread(offset, length)


def write(device: Device, offset: int, data: bytes, *, fua: bool = False) -> None:
    with device.open(os.O_RDWR | (os.O_DSYNC if fua else 0)) as disk:
        disk.pwrite(data, offset)


def flush(device: Device) -> None:
    with device.open() as disk:
        disk.fsync()


def fails(call: Callable[..., object], *words: object, **named: object) -> bool:
    """Whether a request fails, with EIO; any other error is not expected."""
    try:
        call(*words, **named)
    except OSError as error:
        assert error.errno == errno.EIO, error
        return True
    return False
