"""What a device is made of: the keys of `add --config` and of /etc/ublk-ubi/NAME.json.

The CLI fills one `DeviceOptions`, the daemon reads it.
"""

from __future__ import annotations

import os
from typing import Literal

import msgspec

MIN_STRIPE_SIZE = 64 << 10
MAX_STRIPE_SIZE = 1 << 20
MAX_STRIPES = 2_097_152
METADATA_SIZE = 8 << 20
MAX_QUEUES = 64
MAX_DEPTH = 4096
MIN_RATE = 64 << 10
"""Bytes a second: below, a stripe of 1 MiB would take minutes."""

MAX_RATE = 1 << 34
DEFAULT_DEPTH = 128
COPY_BUFFERS = 32 << 20
"""Bytes of request buffers that a queue has by default on the plain-copy path."""


class DeviceOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything that `add` can be told. Sizes are bytes."""

    base: str
    image: str | None = None
    name: str | None = None
    size: int | None = None
    stripe_size: int | None = None
    image_format: Literal["raw"] | None = None
    queues: int = 1
    depth: int | None = None
    id: int | None = None
    copy_on_read: bool = True
    cache: Literal["writeback", "writethrough", "unsafe"] = "writeback"
    data_path: Literal["auto", "zero-copy", "copy"] = "auto"
    cpus: str | None = None
    hydrator_cpus: str | None = None
    hydrate: bool = False
    rate: int | None = None
    min_free: str = "5%"
    image_cache: Literal["none", "page"] = "none"
    block_size: Literal[512, 4096] | None = None
    format: bool = False
    adopt: bool = False
    force: bool = False
    force_stale: bool = False
    zero: bool = False
    keep_old_data: bool = False
    partscan: bool = False
    recovery: bool = True
    owner: str | None = None
    mode: int = 0o660
    fence_timeout_s: float = 30.0


class Task(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a daemon is started for, in a file that it gets by its descriptor (launch, daemon).

    `ready_fd`: where it says how it went. `recover`: it takes over a disk that another left.
    `go_fd`: it loads all that it needs, and begins when a byte comes from there.
    """

    options: DeviceOptions
    ready_fd: int
    recover: bool = False
    go_fd: int | None = None


def continued(options: DeviceOptions, name: str) -> DeviceOptions:
    """Return the options with which another daemon goes on.

    What made or changed the base was done once; the disk is as large as the kernel has it.
    """
    return msgspec.structs.replace(
        options, name=name, size=None, format=False, adopt=False, zero=False, keep_old_data=False,
        force_stale=False,
    )


def places_of(options: DeviceOptions) -> dict[str, str]:
    """Return where `base` and `image` are, links followed: a live daemon cannot follow them."""
    paths = {"base": options.base, "image": options.image}
    return {what: os.path.realpath(path) for what, path in paths.items() if path is not None}
