"""Checks a base that is not in use: its metadata, its table and, with the image, its stripes.

What is found is a list of problems; with the image also how many stripes that are marked hydrated
equal it, differ from it (a guest wrote them), are all zeros where the image is not (a disk of
bdev_ubi's may claim stripes that it never fetched) or cannot be read. Changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from ublk_ubi import metadata, runtime
from ublk_ubi.errors import UbiError
from ublk_ubi.files import check_kind, open_failure, shown, size_of
from ublk_ubi.image import fingerprint
from ublk_ubi.inspect import Inspection, inspect_base
from ublk_ubi.options import MAX_STRIPES, METADATA_SIZE
from ublk_ubi.table import HEADER_BYTES, TableState, look

if TYPE_CHECKING:
    from collections.abc import Callable

_SHOWN = 5


@dataclass
class Comparison:
    """Stripes that are marked hydrated, against the image."""

    equal: int = 0
    differ: int = 0
    zeros: int = 0
    errors: int = 0


@dataclass
class Checked:
    """What `check` found; the keys of its --json. No problem: the base is sound."""

    path: str
    kind: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hydrated: int | None = None
    image_stripes: int | None = None
    stripe_size: int | None = None
    against_image: Comparison | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give it as JSON has it."""
        return {"schema": 1, **asdict(self)}


def check_base(
    path: str,
    *,
    image: str | None = None,
    stripe_size: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Checked:
    """Check the base at `path`, and its stripes against `image`.

    `stripe_size` is for a disk of bdev_ubi's that does not record its own. `progress` hears how
    many of how many hydrated stripes are compared. Raises UbiError for what cannot be looked at.
    """
    try:
        return _check(path, image, stripe_size, progress)
    except OSError as error:
        raise UbiError(
            f"base {shown(path)} cannot be checked: {error.strerror}; see `dmesg` for its disk",
        ) from None


def _check(
    path: str, image: str | None, stripe_size: int | None, progress: Callable[[int, int], None],
) -> Checked:
    found = inspect_base(path)
    result = Checked(path=found.path, kind=found.kind)
    if found.kind not in ("ublk-ubi", "bdev_ubi"):
        result.problems.append(f"{found.description}; {found.advice}")
        return result
    result.hydrated = found.hydrated
    result.image_stripes = found.image_stripes
    result.stripe_size = found.stripe_size or stripe_size
    with _Stripes(found, path) as stripes:
        _check_slots(found, result)
        _check_bounds(found, stripes, result)
        _check_table(found, stripes, result)
        if image is not None:
            result.against_image = _compare(found, stripes, image, result, progress)
    return result


class _Stripes:
    """An open base: its headers, and its stripes."""

    def __init__(self, found: Inspection, path: str) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise open_failure("base", path, error) from None
        self.size = size_of(self.fd)
        self.path = path
        data = os.pread(self.fd, metadata.HEADERS_OFFSET + 2 * MAX_STRIPES, 0)
        self.flags = data[metadata.HEADERS_OFFSET :: 2]
        self.image_size = found.image_size

    def marked(self, stripes: int) -> list[int]:
        """Return the numbers of those that the base says it has."""
        return [n for n, flag in enumerate(self.flags[:stripes]) if flag]

    def __enter__(self) -> Self:
        """Return it; `with` closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the base."""
        os.close(self.fd)


def _check_slots(found: Inspection, result: Checked) -> None:
    for number, slot in enumerate(found.slots):
        if slot.problem is not None and slot.problem != "never written":
            result.problems.append(f"extension {number} is {slot.problem}; the other one counts")
    if found.open:
        result.notes.append(
            "it was not closed: in use, or its daemon died" if found.this_boot
            else "it was open when its machine went down: what was flushed is there",
        )


def _check_bounds(found: Inspection, stripes: _Stripes, result: Checked) -> None:
    if found.hydrated_past_image:
        result.problems.append(
            f"{found.hydrated_past_image} stripes past the image are marked hydrated",
        )
    if found.image_stripes is not None and found.stripe_size is not None:
        needed = METADATA_SIZE + max(
            found.image_stripes * found.stripe_size, found.disk_size or 0,
        )
        if stripes.size < needed:
            result.problems.append(
                f"it has {stripes.size} bytes, and needs {needed}: it was cut off",
            )


def _check_table(found: Inspection, stripes: _Stripes, result: Checked) -> None:
    """Header bits that a running device's table does not have were written by somebody else."""
    if found.uuid is None or not found.open or not found.this_boot:
        return
    path = os.path.join(runtime.run_root(), ".tables", found.uuid.replace("-", ""))
    table = look(path)
    if table.state is TableState.LIVE:
        result.notes.append("a device uses it now: this is a moment's view")
    elif table.state is TableState.NONE:
        result.problems.append("its record of writes is gone: acknowledged writes may be lost")
    elif table.state is TableState.DAMAGED:
        result.problems.append(f"its record of writes is damaged: {path}")
    elif table.latch:
        result.problems.append(
            f"an fdatasync of it failed ({os.strerror(table.latch)}): writes may be lost",
        )
    if table.state not in (TableState.LIVE, TableState.FOUND):
        return
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        rows = file.read(found.image_stripes or 0)
    foreign = [n for n in stripes.marked(len(rows)) if not rows[n]]
    if foreign:
        listed = ", ".join(map(str, foreign[:_SHOWN]))
        result.problems.append(
            f"{len(foreign)} stripes are marked hydrated that its daemon did not hydrate "
            f"({listed}…): another program wrote to it",
        )


def _compare(
    found: Inspection,
    stripes: _Stripes,
    image: str,
    result: Checked,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Read every stripe that is marked hydrated, from both."""
    stripe_size = result.stripe_size
    if stripe_size is None:
        raise UbiError(
            f"base {shown(stripes.path)} does not record its stripe size: give --stripe-size",
        )
    try:
        check_kind("image", image, os.stat(image).st_mode)
        image_fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise open_failure("image", image, error) from None
    try:
        image_size = size_of(image_fd)
        if found.image_size is not None and image_size != found.image_size:
            raise UbiError(
                f"image {shown(image)} has {image_size} bytes, the base was made from one of "
                f"{found.image_size}: give that one",
            )
        if found.image_fingerprint not in (None, fingerprint(image_fd, image_size).hex()):
            result.problems.append(f"the image {shown(image)} is not the one it was made from")
        marked = stripes.marked(-(-image_size // stripe_size))
        counts = Comparison()
        for done, stripe in enumerate(marked):
            progress(done, len(marked))
            _compare_stripe(stripes.fd, image_fd, stripe, stripe_size, counts)
        progress(len(marked), len(marked))
    finally:
        os.close(image_fd)
    if counts.errors:
        result.problems.append(f"{counts.errors} stripes cannot be read")
    if counts.zeros and found.kind == "bdev_ubi":
        result.problems.append(
            f"{counts.zeros} stripes are marked hydrated and hold zeros, the image data: bdev_ubi "
            "may never have fetched them",
        )
    return counts


def _compare_stripe(
    base_fd: int, image_fd: int, stripe: int, stripe_size: int, counts: Comparison,
) -> None:
    try:
        ours = os.pread(base_fd, stripe_size, METADATA_SIZE + stripe * stripe_size)
        theirs = os.pread(image_fd, stripe_size, stripe * stripe_size)
    except OSError:
        counts.errors += 1
        return
    if ours[: len(theirs)] == theirs and not any(ours[len(theirs) :]):
        counts.equal += 1
    elif ours.count(0) == len(ours):
        counts.zeros += 1
    else:
        counts.differ += 1
