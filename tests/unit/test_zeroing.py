"""Zeroing a range of a file: a hole, or zeros."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import zeroing

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
UNKNOWN_FLAG = 0x80                # no filesystem knows it: EOPNOTSUPP


@pytest.mark.parametrize("holes", [True, False], ids=["holes", "none"])
def test_only_the_range_reads_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holes: bool,
) -> None:
    if not holes:
        monkeypatch.setattr(zeroing, "FALLOC_FL_PUNCH_HOLE", UNKNOWN_FLAG)
    path = tmp_path / "base"
    path.write_bytes(b"x" * 6 * MIB)
    fd = os.open(path, os.O_RDWR)
    try:
        zeroing.zero(fd, MIB, 3 * MIB + 4096, is_block=False)
        os.fsync(fd)
        blocks = os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)
    assert path.read_bytes() == b"x" * MIB + bytes(3 * MIB + 4096) + b"x" * (2 * MIB - 4096)
    assert (blocks < 6 * MIB) == holes


def test_an_error_is_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "base"
    path.write_bytes(b"x" * MIB)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            zeroing.zero(fd, 0, MIB, is_block=False)
    finally:
        os.close(fd)
