"""What a disk is made of again: its blocks and its size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.geometry import keep_blocks, keep_size

GIB = 1 << 30
FILE: Any = SimpleNamespace(path="/srv/base", is_block=False)
VOLUME: Any = SimpleNamespace(path="/dev/vg/base", is_block=True)


@pytest.mark.parametrize(("recorded", "needed", "asked", "blocks"), [
    (0, 512, None, 512),
    (4096, 4096, None, 4096),
    (4096, 512, None, 4096),
    (4096, 512, 512, 512),
    (512, 4096, 4096, 4096),
])
def test_blocks(recorded: int, needed: int, asked: int | None, blocks: int) -> None:
    assert keep_blocks(FILE, recorded, needed, asked) == blocks


@pytest.mark.parametrize(("recorded", "needed", "way_out"), [
    (512, 4096, "put it where it was, or give --block-size 4096"),
    (1024, 512, "upgrade ublk-ubi"),
])
def test_blocks_that_cannot_be_had(recorded: int, needed: int, way_out: str) -> None:
    with pytest.raises(UbiError, match=way_out):
        keep_blocks(FILE, recorded, needed, None)


@pytest.mark.parametrize(("base", "recorded", "room", "asked", "size"), [
    (FILE, 0, 2 * GIB, None, 2 * GIB),
    (VOLUME, 0, 2 * GIB, None, 2 * GIB),      # of before sizes were recorded
    (FILE, GIB, 2 * GIB, None, 2 * GIB),      # what is new of a file reads zero
    (FILE, GIB, 2 * GIB, 2 * GIB, 2 * GIB),
    (VOLUME, GIB, GIB, None, GIB),
    (VOLUME, GIB, GIB, GIB, GIB),
    (FILE, 2 * GIB, GIB, GIB, GIB),           # somebody has said so
])
def test_size(base: Any, recorded: int, room: int, asked: int | None, size: int) -> None:
    assert keep_size(base, recorded, room, asked) == (size, None)


def test_a_volume_that_has_grown_shows_nothing_that_was_there_before() -> None:
    size, warning = keep_size(VOLUME, GIB, 2 * GIB, None)
    assert size == GIB
    assert warning is not None
    assert "keeps its 1073741824 bytes" in warning
    assert "until `ublk-ubi resize`" in warning


def test_a_size_does_not_make_it_show_that() -> None:
    with pytest.raises(UbiError, match=r"--size asks for .* let `ublk-ubi resize` zero") as error:
        keep_size(VOLUME, GIB, 2 * GIB, 2 * GIB)
    assert error.value.code == Exit.USAGE


@pytest.mark.parametrize("base", [FILE, VOLUME])
def test_a_base_that_has_shrunk(base: Any) -> None:
    with pytest.raises(UbiError, match=f"as large as it was, or give --size {GIB} to do without"):
        keep_size(base, 2 * GIB, GIB, None)
