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


class Opener:
    """What the base says of its disk's size."""

    def __init__(self) -> None:
        self.recorded = 0
        self.error: OSError | None = None

    def grow(self, _session: object, size: int) -> None:
        if self.error is not None:
            raise self.error
        self.recorded = size


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
            plane=SimpleNamespace(latch=0), opener=Opener(), degraded=lambda: "an fdatasync failed",
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
    assert session.opener.recorded == 2 * SIZE
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


def test_a_size_is_recorded_once_the_new_part_is_zero(
    session: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That it is durable by then is the opener's matter."""
    done: list[object] = []
    session.base.is_block = True
    session.size -= 4096
    monkeypatch.setattr(growth.zeroing, "zero", lambda *_, **__: done.append("zeroed"))
    monkeypatch.setattr(session.opener, "grow", lambda _session, size: done.append(size))
    assert growth.prepare(session, None, keep_old_data=False) == SIZE
    assert done == ["zeroed", SIZE]
    session.size = SIZE
    assert growth.prepare(session, None, keep_old_data=False) == SIZE
    assert done == ["zeroed", SIZE]


def test_a_size_that_cannot_be_recorded(session: Any) -> None:
    session.opener.error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(UbiError, match="new size cannot be recorded: Input/output error; check"):
        growth.prepare(session, 2 * SIZE, keep_old_data=False)


def test_a_disk_that_cannot_make_anything_durable_does_not_grow(session: Any) -> None:
    session.plane.latch = errno.EIO
    with pytest.raises(UbiError, match="vm1 cannot grow: an fdatasync failed") as error:
        growth.prepare(session, 2 * SIZE, keep_old_data=False)
    assert error.value.code == Exit.DEGRADED
    assert os.fstat(session.base.fd).st_size == METADATA_SIZE + SIZE
