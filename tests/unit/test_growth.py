"""What a disk's new size must be, before its base is touched for it."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ublk_ubi import growth
from ublk_ubi.base import open_base
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import METADATA_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20


class Plane:
    """What requests are taken of."""

    def __init__(self) -> None:
        self.latch = 0
        self.allowed = 0

    def grow(self, size: int) -> None:
        self.allowed = size


class Opener:
    """What the base says of its disk's size."""

    def __init__(self) -> None:
        self.recorded_device_bytes = SIZE
        self.error: OSError | None = None

    def grow(self, _session: object, size: int) -> None:
        if self.error is not None:
            raise self.error
        self.recorded_device_bytes = size


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Any]:
    """A disk of SIZE in blocks of 4096 on a file."""
    path = tmp_path / "base"
    path.touch()
    os.truncate(path, METADATA_SIZE + SIZE)
    with open_base(
        str(path), image=None, size=None, create_data_size=0, fence_timeout_s=0,
    ) as base:
        yield SimpleNamespace(
            base=base, block_size=4096, size=SIZE, claim=SimpleNamespace(name="vm1"),
            plane=Plane(), opener=Opener(), degraded=lambda: "an fdatasync failed",
            device=SimpleNamespace(size_by_now=lambda: 0),
        )


@pytest.mark.parametrize(("size", "way_out"), [(2 * SIZE + 512, 2 * SIZE), (1, 4096)])
def test_a_size_of_no_whole_blocks_leaves_the_base_alone(
    session: Any, size: int, way_out: int,
) -> None:
    with pytest.raises(UbiError, match=f"size {size} .* 4096 bytes: use {way_out}$") as error:
        growth.prepare(session, size, keep_old_data=False)
    assert error.value.code == Exit.USAGE
    assert os.fstat(session.base.fd).st_size == METADATA_SIZE + SIZE


def test_a_file_is_grown(session: Any) -> None:
    assert growth.prepare(session, 2 * SIZE, keep_old_data=False) == 2 * SIZE
    assert os.fstat(session.base.fd).st_size == METADATA_SIZE + 2 * SIZE
    assert session.opener.recorded_device_bytes == 2 * SIZE
    assert growth.prepare(session, None, keep_old_data=False) == 2 * SIZE


def test_a_disk_does_not_shrink(session: Any) -> None:
    with pytest.raises(UbiError, match="a disk can grow, not shrink"):
        growth.prepare(session, SIZE - 4096, keep_old_data=False)


def test_what_cannot_be_zeroed_is_told(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.truncate(session.base.fd, METADATA_SIZE + 2 * SIZE)
    session.base.is_block = True
    monkeypatch.setattr(growth, "size_of", lambda fd: os.fstat(fd).st_size)
    monkeypatch.setattr(growth.zeroing, "zero", zero)
    with pytest.raises(UbiError, match="new part cannot be zeroed: Input/output error; --keep-old"):
        growth.prepare(session, None, keep_old_data=False)
    assert growth.prepare(session, None, keep_old_data=True) == 2 * SIZE


@pytest.fixture
def done(session: Any, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is done to the base, which has room for 2 × SIZE."""
    made: list[object] = []

    def zero(_fd: int, offset: int, length: int, **_: object) -> None:
        made.append((offset - METADATA_SIZE, length))

    def grow(_session: object, size: int) -> None:
        session.opener.recorded_device_bytes = size
        made.append(size)

    os.truncate(session.base.fd, METADATA_SIZE + 2 * SIZE)
    monkeypatch.setattr(growth.zeroing, "zero", zero)
    monkeypatch.setattr(session.opener, "grow", grow)
    monkeypatch.setattr(growth, "size_of", lambda fd: os.fstat(fd).st_size)
    return made


def test_a_size_is_recorded_once_the_new_part_is_zero(session: Any, done: list[object]) -> None:
    """That it is durable by then is the opener's matter."""
    session.base.is_block = True
    assert growth.prepare(session, None, keep_old_data=False) == 2 * SIZE
    assert done == [(SIZE, SIZE), 2 * SIZE]


def test_what_the_kernel_has_by_now_is_not_zeroed(session: Any, done: list[object]) -> None:
    """It may have grown the disk though it did not say so in time: a guest may have written."""
    session.base.is_block = True
    session.device.size_by_now = lambda: SIZE + SIZE // 2
    session.opener.recorded_device_bytes = 2 * SIZE
    assert growth.prepare(session, SIZE + SIZE // 2, keep_old_data=False) == SIZE + SIZE // 2
    assert done == []
    assert session.size == session.plane.allowed == SIZE + SIZE // 2
    assert growth.prepare(session, None, keep_old_data=False) == 2 * SIZE
    assert done == [(SIZE + SIZE // 2, SIZE // 2)]
    with pytest.raises(UbiError, match="a disk can grow, not shrink"):
        growth.prepare(session, SIZE, keep_old_data=False)


def test_what_a_file_was_made_larger_by_is_zero_already(session: Any, done: list[object]) -> None:
    """Also where the filesystem does not tell holes from data."""
    os.truncate(session.base.fd, METADATA_SIZE + SIZE + 4096)
    assert growth.prepare(session, 2 * SIZE, keep_old_data=False) == 2 * SIZE
    assert done == [2 * SIZE]


def test_a_files_new_part_is_zeroed_if_it_is_no_hole(session: Any, done: list[object]) -> None:
    with open(session.base.path, "r+b") as file:
        file.seek(METADATA_SIZE + 2 * SIZE - 4096)
        file.write(b"o" * 4096)
    assert growth.prepare(session, None, keep_old_data=True) == 2 * SIZE
    assert done == [2 * SIZE]
    session.opener.recorded_device_bytes = SIZE
    assert growth.prepare(session, None, keep_old_data=False) == 2 * SIZE
    assert done[1:] == [(SIZE, SIZE), 2 * SIZE]


def test_a_disk_that_went_meanwhile_has_not_grown(session: Any) -> None:
    session.opener.error = OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
    with pytest.raises(UbiError, match="vm1 is stopping: it has not grown") as error:
        growth.prepare(session, 2 * SIZE, keep_old_data=False)
    assert error.value.code == Exit.BUSY


def test_a_size_that_cannot_be_recorded(session: Any) -> None:
    session.opener.error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(UbiError, match="size cannot be recorded: Input/output error; check"):
        growth.prepare(session, 2 * SIZE, keep_old_data=False)


def test_a_disk_that_cannot_make_anything_durable_does_not_grow(session: Any) -> None:
    session.plane.latch = errno.EIO
    with pytest.raises(UbiError, match="vm1 cannot grow: an fdatasync failed") as error:
        growth.prepare(session, 2 * SIZE, keep_old_data=False)
    assert error.value.code == Exit.DEGRADED
    assert os.fstat(session.base.fd).st_size == METADATA_SIZE + SIZE
