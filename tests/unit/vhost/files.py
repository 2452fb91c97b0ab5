"""The disks of fake daemons are files, whose block size SPDK does not find, as it does a disk's."""

from __future__ import annotations

from typing import Any

from ublk_ubi import spdk

_bdev_call = spdk.bdev_call


def with_block_size(device: Any, wanted: Any) -> dict[str, Any]:
    """What is said to SPDK of a disk, and its block size."""
    request = _bdev_call(device, wanted)
    request["params"]["block_size"] = 512
    return request
