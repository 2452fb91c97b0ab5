"""Says what a base holds: its metadata, and in plain words what that means and what to do.

Reads the first 8 MiB and nothing else; opens read-only, takes no lock, waits for no daemon. What it
shows of a running device is a moment's view.
"""

from __future__ import annotations

import os
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ublk_ubi import blockdev, content, metadata
from ublk_ubi.errors import UbiError
from ublk_ubi.files import open_failure, shown, uuid_text
from ublk_ubi.options import METADATA_SIZE
from ublk_ubi.sizes import format_size

if TYPE_CHECKING:
    from ublk_ubi.metadata import Extension, Metadata

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BLOCK = 1 << 20  # bytes of one read


@dataclass(frozen=True)
class SlotView:
    """A slot of the extension: where, whether it counts, and why it does not."""

    offset: int
    valid: bool
    sequence: int | None
    problem: str | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; the keys of its --json. Sizes and offsets are bytes.

    `kind`: "ublk-ubi", "bdev_ubi", "empty", "foreign", "newer" or "damaged".
    """

    path: str
    size: int
    kind: str
    description: str
    advice: str
    magic: bool = False
    version: str | None = None
    stripe_size: int | None = None
    possible_stripe_sizes: tuple[int, ...] = ()
    block_size: int | None = None
    slots: tuple[SlotView, ...] = ()
    image_size: int | None = None
    image_stripes: int | None = None
    image_fingerprint: str | None = None
    uuid: str | None = None
    generation: int | None = None
    boot_id: str | None = None
    this_boot: bool | None = None
    open: bool | None = None
    hydrated: int | None = None
    hydrated_past_image: int | None = None
    data_offset: int | None = None
    data_size: int | None = None
    disk_size: int | None = None
    first_hydrated_stripe: int | None = None
    first_hydrated_offset: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give it as JSON has it."""
        return {"schema": 1, **asdict(self)}


def inspect_base(path: str) -> Inspection:
    """Look at the base at `path`. Raises UbiError if it cannot be read or is no disk at all."""
    size, data = _read_start(path)
    found = metadata.parse(data)
    common: dict[str, Any] = {"path": os.path.abspath(path), "size": size}
    if not found.magic:
        return _inspect_other(found, data, common)
    common |= _facts(found, size)
    newer = [slot for slot in found.slots if slot.problem.startswith("newer")]
    version = (found.major, found.minor)
    if newer or version not in (metadata.VERSION_CLOSED, metadata.VERSION_OPEN):
        why = newer[0].problem if newer else f"newer: on-disk version {found.major}.{found.minor}"
        return Inspection(
            kind="newer",
            description=f"a ublk-ubi disk of a newer version ({why.removeprefix('newer: ')})",
            advice="upgrade ublk-ubi to use it",
            **common,
        )
    if found.contradicts_itself:
        return Inspection(
            kind="damaged",
            description="a ublk-ubi disk whose stripe size at byte 13 contradicts its extension: "
            "another program made a disk over it",
            advice="restore its first 8 MiB from a backup, or start anew with "
            "`ublk-ubi add … --format`",
            **common,
        )
    if found.extension is not None:
        return _inspect_ours(found, found.extension, common)
    if all(slot.is_zero for slot in found.slots) and version == metadata.VERSION_CLOSED:
        return _inspect_bdev_ubi(found, common)
    return Inspection(
        kind="damaged",
        description="a ublk-ubi disk whose extension is damaged: no slot of it is valid",
        advice="restore its first 8 MiB from a backup; do not write to it",
        **common,
    )


def _inspect_other(found: Metadata, data: bytes, common: dict[str, Any]) -> Inspection:
    """Name what is not ours, or not ours any more."""
    words = content.describe(data[: content.PROBE_SIZE])
    path = shown(common["path"])
    if found.blank and common["size"] < METADATA_SIZE:
        return Inspection(
            kind="empty",
            description="empty, and too small for a base (8 MiB of metadata come first)",
            advice=f"remove it, and let `ublk-ubi add --image IMAGE --base {path}` make it",
            **common,
        )
    if found.blank:
        return Inspection(
            kind="empty",
            description="empty: its first 8 MiB are zero",
            advice=f"`ublk-ubi add --image IMAGE --base {path}` makes a disk of it",
            **common,
        )
    if found.was_cut_short:
        return Inspection(
            kind="empty",
            description="a ublk-ubi disk whose creation was cut short: nothing was kept on it",
            advice=f"`ublk-ubi add --image IMAGE --base {path}` makes it again",
            **common,
        )
    if words is None and found.extension is not None:
        return Inspection(
            kind="damaged",
            description="a ublk-ubi disk whose start is damaged: its magic is gone",
            advice="restore its first 8 MiB from a backup; `ublk-ubi add … --format` starts anew",
            **common,
        )
    return Inspection(
        kind="foreign",
        description=words or "data of an unknown kind (encrypted disks look like that, too)",
        advice="`ublk-ubi add … --format` would destroy it; choose another base to keep it",
        **common,
    )


def _inspect_ours(found: Metadata, extension: Extension, common: dict[str, Any]) -> Inspection:
    """Describe a disk of this program."""
    done = found.hydrated(extension.image_stripes)
    boot_id = uuid_text(extension.boot_id)
    this_boot = boot_id == current_boot_id()
    path = shown(common["path"])
    image = "" if done == extension.image_stripes else "--image IMAGE "
    reopen = f"`ublk-ubi add {image}--base {path}` opens it"
    if not image:
        reopen += ", independent of its image"
    if not extension.is_open:
        description, advice = "a ublk-ubi disk, closed cleanly", reopen
    elif this_boot:
        description = "a ublk-ubi disk, open since this boot: in use, or its daemon died"
        advice = f"see `ublk-ubi list`; if it is not there, {reopen}"
    else:
        description = "a ublk-ubi disk that was open when its machine went down"
        advice = f"{reopen}; what was flushed is there"
    return Inspection(
        kind="ublk-ubi",
        description=description,
        advice=advice,
        image_size=extension.image_size,
        image_stripes=extension.image_stripes,
        image_fingerprint=extension.fingerprint.hex(),
        uuid=uuid_text(extension.uuid),
        generation=extension.generation,
        block_size=extension.block_size,
        disk_size=extension.disk_size,
        boot_id=boot_id,
        this_boot=this_boot,
        open=extension.is_open,
        hydrated=done,
        hydrated_past_image=found.hydrated() - done,
        **common,
    )


def _inspect_bdev_ubi(found: Metadata, common: dict[str, Any]) -> Inspection:
    """Describe a disk that bdev_ubi made, and that we have not touched."""
    path = shown(common["path"])
    sizes = found.possible_stripe_sizes
    advice = f"adopt it with `ublk-ubi add --adopt --image ITS-IMAGE --base {path}`"
    if not sizes:
        return Inspection(
            kind="damaged",
            description="a bdev_ubi disk with an impossible stripe size: "
            f"byte {found.stripe_size_byte}",
            advice="restore its first 8 MiB from a backup; do not write to it",
            hydrated=found.hydrated(),
            **common,
        )
    if len(sizes) > 1:
        shown_sizes = ", ".join(format_size(size) for size in sizes)
        advice += f" and --stripe-size, which it does not tell: {shown_sizes}"
    return Inspection(
        kind="bdev_ubi",
        description="a bdev_ubi disk",
        advice=advice,
        hydrated=found.hydrated(),
        **common,
    )


def _facts(found: Metadata, size: int) -> dict[str, Any]:
    """Collect what every disk with the magic tells."""
    extension, sizes = found.extension, found.possible_stripe_sizes
    stripe_size = sizes[0] if len(sizes) == 1 else None
    if extension is not None:
        stripe_size = extension.stripe_size
    first = found.first_hydrated()
    return {
        "magic": True,
        "version": f"{found.major}.{found.minor}",
        "stripe_size": stripe_size,
        "possible_stripe_sizes": sizes,
        "slots": tuple(
            SlotView(
                offset=slot.offset,
                valid=slot.extension is not None,
                sequence=slot.extension.sequence if slot.extension else None,
                problem=None if slot.extension else slot.problem or "never written",
            )
            for slot in found.slots
        ),
        "data_offset": METADATA_SIZE,
        "data_size": max(0, size - METADATA_SIZE),
        "first_hydrated_stripe": first,
        "first_hydrated_offset": (
            METADATA_SIZE + first * stripe_size if stripe_size and first is not None else None
        ),
    }


def current_boot_id() -> str:
    """Return the kernel's id of this boot."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def _read_start(path: str) -> tuple[int, bytes]:
    """Read a base's size and its first 8 MiB; raises UbiError."""
    if "\0" in path or not path:
        raise UbiError(f"base {path!r} is not a path: name a file or block device")
    try:
        # Non-blocking, so that a FIFO does not hang the open; not followed by any write.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise open_failure("base", path, error) from None
    try:
        return _read_fd(fd, path)
    except OSError as error:
        raise UbiError(f"base {shown(path)} cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def _read_fd(fd: int, path: str) -> tuple[int, bytes]:
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        size = blockdev.size(fd)
    elif stat.S_ISREG(mode):
        size = os.fstat(fd).st_size
    else:
        what = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise UbiError(f"base {shown(path)} is {what}: name a regular file or block device")
    pieces, left = [], METADATA_SIZE
    while left and (piece := os.pread(fd, min(left, _BLOCK), METADATA_SIZE - left)):
        pieces.append(piece)
        left -= len(piece)
    return size, b"".join(pieces)
