"""Bdevs and configuration in SPDK's words.

Fields, their order and their names are those of SPDK's `bdev_get_bdevs` and of its --json files, so
that its clients find what they look for. Nothing here waits: folders in /run and sysfs are all that
is read.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ublk_ubi import runtime

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device
    from ublk_ubi.serve.book import Base, Book, Disk

SUBSYSTEMS = ({"subsystem": "bdev", "depends_on": []},
              {"subsystem": "vhost_blk", "depends_on": ["bdev"]})
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_DEFAULT_BLOCK = 512
_IO_TYPES = (
    "read", "write", "unmap", "flush", "reset", "nvme_admin", "nvme_io", "nvme_io_md",
    "write_zeroes", "zcopy", "get_zone_info", "zone_management", "zone_append", "compare",
    "compare_and_write", "abort", "seek_hole", "seek_data", "copy", "nvme_iov_md",
)
_OF_A_DISK = ("read", "write", "unmap", "flush", "write_zeroes")
_OF_A_BASE = ("read", "write", "flush", "reset")


def all_bdevs(book: Book) -> list[dict[str, Any]]:
    """Describe every bdev: names for paths, and the disks of this host, created here or not."""
    disks = [device for device in runtime.all_devices() if _is_there(device)]
    shown = [_describe_base(base, claimed=bool(book.disks_on(base))) for base in book.bases()]
    return [*shown, *(_describe_disk(device, book.disk_of(device)) for device in disks)]


def one_bdev(book: Book, name: str) -> dict[str, Any] | None:
    """Describe one by its name; None if there is none."""
    for base in book.bases():
        if base.name == name:
            return _describe_base(base, claimed=bool(book.disks_on(base)))
    device = runtime.find(name) if runtime.NAME_PATTERN.fullmatch(name) else None
    if device is None or not _is_there(device):
        return None
    return _describe_disk(device, book.disk_of(device))


def subsystem_config(book: Book, subsystem: str) -> list[dict[str, Any]] | None:
    """Return the calls that make of nothing what is there; None for an unknown subsystem."""
    if subsystem == "bdev":
        disks = [(device, book.disk_of(device)) for device in runtime.all_devices()]
        return [
            *(_base_call(base) for base in book.bases()),
            *(_disk_call(disk) for _, disk in disks if disk is not None),
        ]
    return book.controllers() if subsystem == "vhost_blk" else None


def configuration(book: Book) -> dict[str, Any]:
    """Return what --json takes."""
    names = [str(entry["subsystem"]) for entry in SUBSYSTEMS]
    configs = [{"subsystem": name, "config": subsystem_config(book, name)} for name in names]
    return {"subsystems": [entry for entry in configs if entry["config"]]}


def _is_there(device: Device) -> bool:
    return device.state is not None and device.state.id is not None and not device.starting


def _describe(
    name: str, product: str, *, block: int, size: int, uuid: str | None,
    io_types: tuple[str, ...], specific: dict[str, Any], claimed: bool,
) -> dict[str, Any]:
    return {
        "name": name,
        "aliases": [uuid] if uuid else [],
        "product_name": product,
        "block_size": block,
        "num_blocks": size // block,
        "uuid": uuid or _NO_UUID,
        "assigned_rate_limits": dict.fromkeys(
            ("rw_ios_per_sec", "rw_mbytes_per_sec", "r_mbytes_per_sec", "w_mbytes_per_sec"), 0,
        ),
        "claimed": claimed,
        **({"claim_type": "exclusive_write"} if claimed else {}),
        "zoned": False,
        "supported_io_types": {kind: kind in io_types for kind in _IO_TYPES},
        "driver_specific": specific,
    }


def _describe_base(base: Base, *, claimed: bool) -> dict[str, Any]:
    product = "AIO disk" if base.kind == "aio" else "URING bdev"
    specific: dict[str, Any] = {"filename": base.path}
    if base.kind == "aio":
        specific["readonly"] = base.readonly
    return _describe(
        base.name, product, block=base.block_size or _DEFAULT_BLOCK, size=base.size,
        uuid=base.uuid, io_types=_OF_A_BASE, specific={base.kind: specific}, claimed=claimed,
    )


def _describe_disk(device: Device, disk: Disk | None) -> dict[str, Any]:
    state = device.state
    assert state is not None
    specific: dict[str, Any] = {
        "base_bdev": disk.params.base_bdev if disk is not None else None,
        "base_path": state.base,
        "image_path": state.image,
        "device": state.device,
        "link": state.link,
        "alive": device.alive,
    }
    if disk is not None:
        specific |= {
            "stripe_size_kb": disk.params.stripe_size >> 10, "cache": disk.params.cache_mode,
            "copy_on_read": disk.params.copy_on_read, "directio": disk.params.directio,
        }
    return _describe(
        device.name, "Ubi disk", block=_block_size(state.id), size=state.size or 0,
        uuid=disk.uuid if disk is not None else None, io_types=_OF_A_DISK,
        specific={"ubi": specific}, claimed=False,
    )


def _block_size(dev_id: int | None) -> int:
    path = f"/sys/block/ublkb{dev_id}/queue/logical_block_size"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return _DEFAULT_BLOCK
    try:
        return int(os.read(fd, 16))
    except (OSError, ValueError):
        return _DEFAULT_BLOCK
    finally:
        os.close(fd)


def _base_call(base: Base) -> dict[str, Any]:
    params: dict[str, Any] = {"name": base.name}
    if base.block_size is not None:
        params["block_size"] = base.block_size
    params["filename"] = base.path
    if base.kind == "aio":
        params["readonly"] = base.readonly
    if base.uuid is not None:
        params["uuid"] = base.uuid
    return {"method": f"bdev_{base.kind}_create", "params": params}


def _disk_call(disk: Disk) -> dict[str, Any]:
    """Write bdev_ubi's seven parameters as it does, then those of ours that were given."""
    params = disk.params
    call: dict[str, Any] = {
        "name": params.name,
        "base_bdev": params.base_bdev,
        "image_path": params.image_path,
        "stripe_size_kb": params.stripe_size >> 10,
        "copy_on_read": params.copy_on_read,
        "directio": params.directio,
        "no_sync": params.no_sync,
    }
    for key in ("cache", "hydrate", "rate", "queues", "depth"):
        value = getattr(params, key)
        if value not in (None, False) and (key, value) != ("queues", 1):
            call[key] = value
    return {"method": "bdev_ubi_create", "params": call}
